"""Chat with a model: type a message, read the answer as it comes.

python chat.py --model openai/gpt-oss-120b

/help lists the commands. Ctrl-C ends an answer, Ctrl-D the program. Where stdout is no terminal, only final answers are
written to it.
"""

import host.start

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from checkpoints.harmony import Piece, Setting
from command_line.run import run_main
from command_line.scripts import arguments
from gpt_oss_megakernel import MegaModel
from host import cli
from host.conversation import FINAL, Conversation, Turn
from host.generation import for_terminal
from host.sampling import Sampling
from load_model import files_of, open_model
from system.errors import InputError, printable
from system.output_file import output_path, replacing
from system.program import replaced_handlers

DIM, PLAIN = "\033[2m", "\033[0m"
HELP = """\
/reset                       forget the conversation
/reasoning low|medium|high   how long the model thinks
/system [TEXT]               who the model is; without TEXT as trained
/developer [TEXT]            instructions; without TEXT none
/time                        show or hide each answer's times
/save FILE                   write the conversation as JSON
/quit                        end; Ctrl-D too"""


def setting_of(args: argparse.Namespace) -> Setting:
    """Return the setting that the command line asks for."""
    _check_unicode("--system", args.system)
    _check_unicode("--developer", args.developer)
    fields = {"identity": args.system} if args.system else {}
    return Setting(args.reasoning, args.date, args.developer, **fields)


def _check_unicode(flag: str, text: str | None) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"{flag}: is not valid UTF-8") from None


class AnswerEnded(KeyboardInterrupt):
    """Ctrl-C, which ends an answer; other signals end the program."""


def _end_answer(_number: int, _frame: object) -> None:
    raise AnswerEnded


class Printer:
    """Prints an answer as it comes."""

    def __init__(self, show_reasoning: str):
        self._is_terminal = sys.stdout.isatty()
        self._show_reasoning = show_reasoning if self._is_terminal else "hide"
        self._channel: str | None = None

    def piece(self, piece: Piece) -> None:
        """Print text, on a line of its own where the channel changes."""
        is_answer = piece.channel == FINAL
        if not is_answer and self._show_reasoning == "hide":
            return
        if piece.channel != self._channel:
            self._write(("\n\n" if self._channel else "") + (DIM if self._dims(piece.channel) else PLAIN))
            self._channel = piece.channel
        text = for_terminal(piece.text) if self._is_terminal else piece.text
        print(text, end="", flush=True)

    def _dims(self, channel: str | None) -> bool:
        return channel != FINAL and self._show_reasoning == "dim"

    def _write(self, text: str) -> None:
        if self._is_terminal:
            print(text, end="")

    def end(self) -> None:
        """End the answer's line, if there is one."""
        self._write(PLAIN)
        if self._is_terminal or self._channel:
            print(flush=True)
        self._channel = None


class Chat:
    """Reads messages and commands, and prints answers."""

    def __init__(self, args: argparse.Namespace, sampling: Sampling, conversation: Conversation, inputs: list[Path]):
        self._args, self._conversation, self._inputs = args, conversation, inputs
        self._sampling, self._shows_times = sampling, args.time
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP, file=sys.stderr),
            "/reset": lambda _: conversation.reset(),
            "/reasoning": lambda text: conversation.change(reasoning=text),
            "/system": lambda text: conversation.change(identity=text or Setting.identity),
            "/developer": lambda text: conversation.change(instructions=text or None),
            "/time": self._toggle_times,
            "/save": self._save,
        }

    def run(self) -> None:
        """Answer until the input ends. Raise InputError for a bad line unless a person can type another one."""
        for line in lines():
            text = line.strip()
            is_command = re.match(r"/[a-z]+(\s|$)", text)
            if is_command and text.split()[0] == "/quit":
                return
            try:
                if is_command:
                    self._command(*text.split(None, 1))
                elif text:
                    self._answer(text)
            except AnswerEnded:
                continue
            except InputError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"error: {printable(str(error))}", file=sys.stderr)

    def _command(self, name: str, rest: str = "") -> None:
        if name not in self._commands:
            raise InputError(f"{name}: no such command; /help lists them")
        self._commands[name](rest)

    def _answer(self, text: str) -> None:
        printer, conversation = Printer(self._args.show_reasoning), self._conversation
        pieces = conversation.answer(text, self._sampling, self._args.max_new_tokens)
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    printer.piece(piece)
        finally:
            printer.end()
        if conversation.turn.finish == "length":
            print(f"[cut after {conversation.turn.answer_tokens} tokens]", file=sys.stderr)
        if self._shows_times:
            print(times_of(conversation.turn), file=sys.stderr)

    def _toggle_times(self, _: str) -> None:
        self._shows_times = not self._shows_times
        print(f"times are {'shown' if self._shows_times else 'hidden'}", file=sys.stderr)

    def _save(self, text: str) -> None:
        if not text:
            raise InputError("/save: where to? /save FILE")
        try:
            path = output_path(text)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"/save: {error}") from None
        if os.path.lexists(path):
            raise InputError(f"/save {path}: is there already")
        content = {"setting": asdict(self._conversation.setting)}
        content["messages"] = [asdict(message) for message in self._conversation.messages]
        data = (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
        with replacing(path, len(data), False, inputs=self._inputs, flag="/save") as file:
            file.write(data, 0)
        print(f"saved {printable(str(path))}", file=sys.stderr)


def times_of(turn: Turn) -> str:
    """Return one line: token counts, time to the first token, time per further token."""
    first = "-" if turn.ttft_ms is None else f"{turn.ttft_ms:.1f} ms"
    later = "-" if turn.tpot_ms is None else f"{turn.tpot_ms:.3f} ms"
    return f"[{turn.prompt_tokens} prompt + {turn.answer_tokens} new tokens, first {first}, then {later} per token]"


def lines() -> Iterator[str]:
    """Yield the user's lines until the end of the input; with a prompt, history and arrow keys on a terminal."""
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is not UTF-8 is refused as a message
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys and history
    while (line := typed_line()) is not None:
        yield line


def typed_line() -> str | None:
    """Return a line from the terminal, "" after Ctrl-C, or None at the end of the input."""
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # stdout is for answers
        return input()
    except EOFError:
        return None
    except AnswerEnded:
        print("\n/quit or Ctrl-D ends the program", file=sys.stderr)
        return ""


def main() -> None:
    args = arguments("chat.py")
    sampling = cli.sampling_of(args)
    setting = setting_of(args)
    if sys.stdin is None:
        raise InputError("stdin is closed: there is nobody to chat with")
    checkpoint, tokenizer = open_model(args)
    if tokenizer is None:
        raise InputError(f"--model {args.model}: it has no tokenizer, and cannot chat")
    model = cli.load_model(MegaModel, args, checkpoint)
    if sampling.temperature:
        print(f"seed {sampling.seed}", file=sys.stderr)
    chat = Chat(args, sampling, Conversation(model, tokenizer, setting), files_of(checkpoint))
    at_terminal = {signal.SIGINT: signal.getsignal(signal.SIGINT)} if sys.stdin.isatty() else {}
    with replaced_handlers(at_terminal, _end_answer):
        chat.run()


if __name__ == "__main__":
    sys.exit(run_main(main))
