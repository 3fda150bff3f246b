"""Feed the project with damaged files: `python -m tests.fuzz 10000`.

Real files are changed at random, and what reads them runs on the result. It must end with a result or with sentences
and the exit code 2, and write nothing elsewhere. Case N of a seed is always the same: `python -m tests.fuzz --case N`.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from raytune_emotion.cli import run_guarded
from raytune_emotion.errors import UserError

_LIMIT_S = 60
#: Values that somebody may put in the place of any other.
_ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"),
    "", "x", "1e5", "nan", "../../outside", "/outside", "a\0b", "\x1b[31mred", "[/b]", "<script>", "\ud800", "x" * 5000,
    [], {}, [[]], [None], {"": 0}, {"a": {"b": [1, 2]}}, [1.0] * 300,
)  # fmt: skip
_BITS = (
    b"[" * 60_000,
    b'{"a":' * 60_000,
    b"\0",
    b"\xff\xfe",
    b"\n\n",
    b"9" * 5000,
    b"-",
    b",",
    b'"',
    b"&a [*a]",
    b"!!python/x ",
    b"\r",
)


@dataclass(frozen=True)
class Target:
    """Something that reads files."""

    corpus: Path  # a folder of real files
    files: tuple[str, ...]  # those that are changed, as patterns
    run: Callable[[Path], int]  # with the folder; returns the exit code


@dataclass(frozen=True)
class Failure:
    case: int
    target: str
    file: str
    what: str


def damage(content: bytes, name: str, draw: random.Random) -> bytes:
    """Change the content of a file: a value in it, or some of its bytes."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        change = _change_values if draw.random() < 0.6 else _change_bytes
        content = change(content, name, draw)
    return content


def _change_values(content: bytes, name: str, draw: random.Random) -> bytes:
    try:
        if name.endswith(".safetensors"):
            size = struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8 : 8 + size])
            if (own := header.get("__metadata__")) and draw.random() < 0.8:
                key = draw.choice(sorted(own))
                own[key] = json.dumps(_change(json.loads(own[key]), draw))
            else:
                header = _change(header, draw)
            changed = json.dumps(header).encode("utf-8", "surrogatepass")
            return struct.pack("<Q", len(changed)) + changed + content[8 + size :]
        if name.endswith((".jsonl", ".journal")):
            lines = content.splitlines()
            number = draw.randrange(len(lines))
            lines[number] = json.dumps(_change(json.loads(lines[number]), draw)).encode()
            return b"\n".join(lines) + b"\n"
        if name.endswith(".json"):
            return json.dumps(_change(json.loads(content), draw)).encode()
        if name.endswith(".yaml"):
            return json.dumps(_change(YAML(typ="safe").load(content), draw)).encode()
        if name.endswith((".csv", ".txt")):
            cells = content.split(b",")
            cells[draw.randrange(len(cells))] = str(draw.choice(_ODD)).encode("utf-8", "surrogatepass")
            return b",".join(cells)
    except Exception:  # an earlier change has made it another kind of file
        return _change_bytes(content, name, draw)
    return _change_bytes(content, name, draw)


def _change(value: Any, draw: random.Random) -> Any:
    """Replace, remove, repeat or add one value in a tree of values."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return draw.choice(_ODD)
    holder, key = draw.choice(places)
    how = draw.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[draw.choice(("", "x", "../x", "0", "optim.lr"))] = holder.pop(key)
    elif how == 1:
        holder.append(copy.deepcopy(holder[key]))
    elif how == 2:
        holder[key] = copy.deepcopy(draw.choice(places)[0])
    else:
        holder[key] = draw.choice(_ODD)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change_bytes(content: bytes, name: str, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    to = min(len(content), at + draw.choice((1, 1, 4, 100, 10_000)))
    how = draw.randrange(5)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + content[to:]
    if how == 2:
        # Behind a colon or a comma, as often as anywhere: there a value is looked for.
        signs = [place + 1 for place, sign in enumerate(content[:20_000]) if sign in b":,"]
        at = draw.choice(signs) if signs and draw.random() < 0.5 else at
        return content[:at] + draw.choice(_BITS) + content[at:]
    if how == 3:
        return content[:to] + content[at:to] + content[to:]
    return content[:at] + bytes(draw.randrange(256) for _ in range(min(to - at, 8))) + content[to:]


class Fuzzer:
    """Run the cases of a seed in a scratch folder."""

    def __init__(self, targets: dict[str, Target], scratch: Path, seed: int, limit_s: int = 0) -> None:
        """Make a fuzzer; with a limit, a case that takes longer is a failure."""
        self.targets, self.scratch, self.seed, self.limit_s = targets, scratch, seed, limit_s
        self.codes = Counter[tuple[str, int]]()
        self.said = ""  # on standard error, by the last case

    def check(self) -> list[Failure]:
        """Run every target on its files as they are; return what was wrong."""
        found = []
        for name, target in self.targets.items():
            shutil.rmtree(self.scratch / "place", ignore_errors=True)
            folder = Path(shutil.copytree(target.corpus, self.scratch / "place" / "a" / "b" / "folder"))
            what = self._run(name, target, folder)
            found += [Failure(-1, name, "", what)] if what else []
            if not what and not self.codes[name, 0]:
                found.append(Failure(-1, name, "", f"refuses real files: {self.said}"))
        return found

    def case(self, number: int, only: str | None = None) -> Failure | None:
        """Run one case; return what was wrong."""
        draw = random.Random(f"{self.seed} {number}")
        name = only or draw.choice(sorted(self.targets))
        target, place = self.targets[name], self.scratch / "place"
        shutil.rmtree(place, ignore_errors=True)
        folder = place / "a" / "b" / "folder"
        shutil.copytree(target.corpus, folder)
        files = sorted(path for pattern in target.files for path in folder.glob(pattern))
        file = draw.choice(files)
        file.write_bytes(damage(file.read_bytes(), file.name, draw))
        what = self._run(name, target, folder)
        strangers = {str(path.relative_to(place)) for path in [*place.glob("*"), *place.glob("a/*")]} - {"a", "a/b"}
        if not what and strangers:
            what = f"wrote {strangers}"
        return Failure(number, name, str(file.relative_to(folder)), what) if what else None

    def _run(self, name: str, target: Target, folder: Path) -> str:
        said, out = io.StringIO(), io.StringIO()
        if self.limit_s:
            signal.signal(signal.SIGALRM, _time_out)
            signal.alarm(self.limit_s)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = target.run(folder)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "raytune_emotion" in frame.filename]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
            return f"{where}: {type(error).__name__}: {str(error)[:200]}"
        finally:
            if self.limit_s:
                signal.alarm(0)
        self.codes[name, code] += 1
        self.said = said.getvalue()
        lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        if code not in (0, 2):
            return f"exit code {code}: {said.getvalue()[:300]}"
        if code == 2 and (not lines or any("\x1b" in line or "\0" in line for line in lines)):
            return f"no plain sentence: {said.getvalue()[:300]!r}"
        return ""


class TooLong(Exception):
    """A case took too long."""


def _time_out(*_: object) -> None:
    raise TooLong


def make_files(corpora: Path) -> None:
    """Make real files of each kind."""
    from PIL import Image

    from raytune_emotion.data.packing.pack import pack
    from raytune_emotion.data.synthetic import write_sample
    from raytune_emotion.storage.locations import Folder
    from raytune_emotion.tuning.study.earlier import gather_earlier
    from raytune_emotion.tuning.study.trial_export import export_trial
    from tests.support.studies import write_study

    faces, study, table = corpora / "faces", corpora / "studies" / "study", corpora / "table"
    write_sample(faces, train=6, val=3, image_size=32)
    for file, kind in zip(sorted((faces / "train_set" / "images").iterdir()), ("png", "bmp", "jpeg"), strict=False):
        Image.open(file).save(file.with_suffix(f".{kind}"))
        file.unlink()
    write_study(study, pack(faces, corpora / "store", image_size=32, workers=1), trials=4, epochs=2)
    (study / "earlier.json").write_text(gather_earlier([Folder(study)]))
    export_trial(Folder(study), Folder(corpora / "export"), "0000")
    shutil.copytree(Path(__file__).parents[1] / "search_spaces", corpora / "spaces")
    shutil.copytree(faces / "train_set" / "images", table / "faces")
    files = sorted(file.name for file in (table / "faces").iterdir())
    rows = [f"faces/{name},{'train' if number else 'val'},0.2,0.5,0.3\n" for number, name in enumerate(files)]
    (table / "table.csv").write_text("image,split,happy,sad,neutral\n" + "".join(rows))


def make_targets(corpora: Path) -> dict[str, Target]:
    """Say what reads the files of `make_files`."""
    from raytune_emotion.cli import command_main
    from raytune_emotion.data.packing.pack import pack
    from raytune_emotion.data.store import open_store
    from raytune_emotion.learn.checkpoint import read_best, read_progress
    from raytune_emotion.learn.export_folder import load_package
    from raytune_emotion.learn.run_folder import BEST, read_history
    from raytune_emotion.storage.locations import Folder
    from raytune_emotion.tuning.execution.recorder import Recorder
    from raytune_emotion.tuning.space.parser import load_space
    from raytune_emotion.tuning.study.earlier import gather_earlier
    from raytune_emotion.tuning.study.open_study import open_study

    def command(verb: str, *options: str) -> Callable[[Path], int]:
        return lambda folder: command_main(verb, [option.format(folder) for option in options])

    def guard(read: Callable[[Path], object]) -> Callable[[Path], int]:
        return lambda folder: run_guarded(lambda: (read(folder), None)[1])

    def resume(folder: Path) -> None:
        with open_study(folder) as opened:
            recorder = Recorder(opened)
            recorder.next()
            if isinstance(recorder.error, UserError):
                raise recorder.error
            recorder.close()

    def read_run(folder: Path) -> None:
        read_progress(folder)
        read_history(folder)
        read_best(folder / BEST)

    def read_spaces(folder: Path) -> None:
        for file in folder.glob("*.yaml"):
            load_space(file)

    def pack_to(source: str) -> Callable[[Path], int]:
        return guard(lambda folder: pack(folder / source, folder / "packed", image_size=32, workers=1))

    study = corpora / "studies" / "study"
    histories = ("study.yaml", "optuna.journal", "trials/*/history.jsonl")
    exported = ("study.yaml", "optuna.journal", "trials/0000/best.safetensors", "trials/0000/data.txt")
    return {
        "space": Target(corpora / "spaces", ("*.yaml",), guard(read_spaces)),
        "status": Target(study, histories, command("status", "{}")),
        "report": Target(study, histories, command("report", "{}")),
        "resume": Target(study, (*histories, "earlier.json"), guard(resume)),
        "warm start": Target(study, histories, guard(lambda folder: gather_earlier([Folder(folder)]))),
        "checkpoint": Target(study / "trials" / "0000", ("*.safetensors", "history.jsonl"), guard(read_run)),
        "export": Target(study, exported, command("export", "{}", "{}/exported", "--trial", "0")),
        "predict": Target(corpora / "export", ("*.json", "*.safetensors"), guard(load_package)),
        "store": Target(corpora / "store", ("manifest.json", "*.arrow"), guard(open_store)),
        "faces": Target(corpora / "faces", ("*/annotations/*", "*/images/*"), pack_to("")),
        "table": Target(corpora / "table", ("table.csv",), pack_to("table.csv")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000, help="cases (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--only", help="a target, such as table")
    args = parser.parse_args()
    from raytune_emotion.tuning.report import page

    page.draw_all = lambda *_: ()  # the PNG files take seconds
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-fuzz-") as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        make_files(Path(scratch) / "corpora")
        fuzzer = Fuzzer(make_targets(Path(scratch) / "corpora"), Path(scratch), args.seed, _LIMIT_S)
        numbers = range(args.count) if args.case is None else (args.case,)
        kinds: dict[str, Failure] = {}
        for failure in fuzzer.check():
            raise SystemExit(f"{failure.target}: {failure.what}")
        for number in numbers:
            failure = fuzzer.case(number, args.only)
            if failure is not None and (kind := f"{failure.target} {failure.what[:60]}") not in kinds:
                kinds[kind] = failure
                print(f"case {number}: {failure.target}, {failure.file}: {failure.what}", flush=True)
        print(f"{len(numbers)} cases, {len(kinds)} kinds of failures; {dict(sorted(fuzzer.codes.items()))}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
