"""Archives on a GPU: copies through pinned buffers, packing included, and what the kernel decodes from them."""

import pytest
import torch

import host.upload
from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats
from checkpoints.fp8 import QuantizedCheckpoint
from checkpoints.iris_writer import write_archive
from command_line.options import DEFAULT_MODEL
from gpt_oss_megakernel import MegaModel
from host.launch import tuning_for
from host.upload import Uploader
from host.weights import Weights, load_weights
from load_iris import open_archive
from load_model import open_checkpoint

CUDA = torch.device("cuda")
WIDE = GPT_OSS_120B.cut(1)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_uploads_are_what_was_read(n, dtype, monkeypatch):
    monkeypatch.setattr(host.upload, "BUFFER_BYTES", 16)  # most tensors take turns on the buffers
    upload = Uploader(CUDA)
    tensors = [torch.randn(3, n).mul(50).to(dtype) for _ in range(4)]
    copies = [upload(tensor) for tensor in tensors]
    wide = [torch.empty(3, n, device=CUDA) for _ in tensors]
    for target, tensor in zip(wide, tensors):
        upload.into(target, tensor)
    torch.cuda.synchronize()
    for tensor, copy, target in zip(tensors, copies, wide):
        assert copy.dtype == dtype
        assert torch.equal(copy.cpu(), tensor)
        assert torch.equal(target.cpu(), tensor.float())


def test_uploads_of_strided_tensors():
    matrix = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(Uploader(CUDA)(matrix).cpu(), matrix)


@pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
def test_the_shipped_model_says_the_same_from_an_archive(quant, tmp_path):
    write_archive(open_checkpoint(DEFAULT_MODEL), tmp_path / "m.iris")
    prompt = [1, 2, 3, 500]
    expected = list(MegaModel.from_pretrained(DEFAULT_MODEL, quant, max_context=64).generate(prompt, 40))
    assert list(MegaModel.from_pretrained(tmp_path / "m.iris", quant, max_context=64).generate(prompt, 40)) == expected


def test_full_width_weights_are_those_of_the_checkpoint(tmp_path):
    checkpoint = RandomCheckpoint(WIDE, device=CUDA)
    write_archive(checkpoint, tmp_path / "m.iris")
    tuning = tuning_for(CUDA, WIDE)
    expected = load_weights(checkpoint, WIDE, CUDA, tuning)
    archive = open_archive(tmp_path / "m.iris", verify=True)
    for field, ours, theirs in zip(Weights._fields, load_weights(archive, WIDE, CUDA, tuning), expected):
        assert torch.equal(ours, theirs), field


@pytest.mark.parametrize("dense_format", [FP8_ROWS, FP8_GROUPS])
@pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
def test_the_shipped_model_says_the_same_from_an_archive_in_fp8(quant, dense_format, tmp_path):
    """Bytes quantized on a CPU equal those that the GPU makes at load, and are not quantized again."""
    dense = DenseFormats(dense_format, dense_format, dense_format, dense_format)
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    write_archive(QuantizedCheckpoint(checkpoint, dense), tmp_path / "m.iris")
    expected = MegaModel(checkpoint, quant, max_context=64, dense=dense)
    model = MegaModel.from_pretrained(tmp_path / "m.iris", quant, max_context=64)
    assert model.config == expected.config
    for field, ours, theirs in zip(Weights._fields, model.weights, expected.weights):
        assert torch.equal(ours, theirs), field
    prompt = [1, 2, 3, 500]
    assert list(model.generate(prompt, 40)) == list(expected.generate(prompt, 40))
