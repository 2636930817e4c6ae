"""Copy tensors from host memory to a GPU while the next bytes are read."""

import torch

# With four buffers of 32 MB, filling one from the page cache takes about as long as copying the others to the GPU.
BUFFERS, BUFFER_BYTES = 4, 32 << 20


class Uploader:
    """Copies host tensors, also those in mapped files, to a device through pinned buffers. A CPU needs no buffers."""

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._next = 0
        if device.type == "cuda":
            for _ in range(BUFFERS):
                buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
                self._buffers.append((buffer, torch.cuda.Event()))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the device. The copy is queued on the current stream and may not have ended."""
        if tensor.device.type == self._device.type:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        self.into(copy, tensor)
        return copy

    def into(self, target: torch.Tensor, tensor: torch.Tensor) -> None:
        """Copy to a contiguous tensor of the same shape on the device, which converts the dtype if they differ."""
        if tensor.device.type == self._device.type:
            target.copy_(tensor)
        elif target.dtype != tensor.dtype:
            target.copy_(self(tensor))
        else:
            source, target = tensor.contiguous().view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
            for source_piece, target_piece in zip(source.split(BUFFER_BYTES), target.split(BUFFER_BYTES)):
                self._copy_piece(source_piece, target_piece)

    def _copy_piece(self, source: torch.Tensor, target: torch.Tensor) -> None:
        buffer, copied = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        copied.synchronize()
        pinned = buffer[: len(source)]
        pinned.copy_(source)
        target.copy_(pinned, non_blocking=True)
        copied.record()
