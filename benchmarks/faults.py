"""A campaign of faults: runs are harmed, restarted, and compared bit for bit.

  python benchmarks/faults.py --out=docs/reliability

Runs of the tiny preset are killed at random, during a save, an evaluation, the generation of
the data set or of pairs; asked to stop; given full and read-only disks, damaged checkpoints,
non-finite numbers, hanging workers, a second run on their workdir, and clocks that jump; with
one and with two processes. Each is restarted until it ends, and its last checkpoint
(parameters, EMA weights, moments, counts) is compared with that of an undisturbed run. Finished
trials are recorded in `<out>/trials.jsonl`, so an interrupted campaign resumes. The script
needs root on Linux (to mount small disks) and the library of the package faketime.
"""

import argparse
import collections
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import campaign
import numpy as np
import trials
from safetensors.numpy import load_file, save_file

from jaxpref.runtime import checkpoint_files
from jaxpref.runtime.checkpoint_files import CHECKSUMS

FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"

# Each fault harms a trial and returns the run's message or None. The campaign then restarts the
# trial until it ends. `duration` is that of an undisturbed run.


def kill_anywhere(trial: trials.Trial, duration: float) -> None:
  """Kills all processes at a random time of a run."""
  processes = trial.start()
  time.sleep(trial.random.uniform(0, duration))
  trials.kill(processes)


def kill_one(trial: trials.Trial, duration: float) -> None:
  """Kills one process of several at a random time."""
  processes = trial.start()
  time.sleep(trial.random.uniform(2, duration))
  if any(p.poll() is not None for p in processes):
    raise trials.TooLateError
  trial.random.choice(processes).kill()
  if 0 in (statuses := trials.end(processes)):
    raise RuntimeError(f"the other process ended without an error: {statuses}")


def kill_in_a_save(trial: trials.Trial, duration: float) -> None:
  """Kills all processes while a checkpoint or its checksums are written."""
  del duration
  processes = trial.start()
  iterative = trial.name == "iterative"
  step = trial.random.choice([5, 8] if iterative else range(5, 45, 5))

  def saving() -> bool:
    return any(
      list(at.glob(f"{step}{trials.SAVING}"))
      or ((at / str(step)).exists() and not (at / str(step) / CHECKSUMS).exists())
      for at in trial.checkpoints()
    )

  trials.wait_for(processes, saving)
  time.sleep(trial.random.uniform(0, 0.08))
  trials.kill(processes)


def kill_once_said(trial: trials.Trial, text: str, *, within: float) -> None:
  """Kills all processes at most `within` seconds after a run has logged a text."""
  processes = trial.start()
  trials.wait_for(processes, lambda: text in trial.log())
  time.sleep(trial.random.uniform(0, within))
  trials.kill(processes)


def kill_in_the_evaluation(trial: trials.Trial, duration: float) -> None:
  """Kills a run while images are generated, scored or written."""
  del duration
  kill_once_said(trial, "of the base model", within=2.5)


def kill_in_the_data(trial: trials.Trial, duration: float) -> None:
  """Kills a run while the data set is generated."""
  del duration
  trial.env |= {"TFDS_DATA_DIR": str(trial.directory / "data")}
  kill_once_said(trial, "generating the", within=8)


def kill_in_the_pairs(trial: trials.Trial, duration: float) -> None:
  """Kills a run while pairs are generated, or soon after."""
  del duration
  kill_once_said(trial, f"pairs of iteration {trial.random.choice('12')}", within=2)


def ask_to_stop(trial: trials.Trial, duration: float) -> str:
  """Sends SIGTERM to one process; all must save and stop."""
  processes = trial.start()
  trials.wait_for(processes, (trial.workdir / "metrics.jsonl").exists)
  time.sleep(trial.random.uniform(0, duration / 4))
  trial.random.choice(processes).send_signal(signal.SIGTERM)
  statuses = trials.end(processes)
  if statuses == [0] * len(statuses):
    raise trials.TooLateError
  if statuses != [143] * len(statuses):
    raise RuntimeError(f"it ended with {statuses}: {trial.log()[-500:]}")
  return trials.error_of(trial)


def damage_a_checkpoint(trial: trials.Trial, duration: float) -> None:
  """Cuts, alters or removes a file of the newest checkpoint."""
  del duration
  processes = trial.start()
  step = str(5 * trial.random.randint(2, 7))
  trials.wait_for(
    processes,
    lambda: any((at / step / CHECKSUMS).exists() for at in trial.checkpoints()),
  )
  trials.kill(processes)
  newest = max(trial.checkpoints()[0].glob("[0-9]*"), key=lambda p: (p.suffix, int(p.stem)))
  files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
  file = trial.random.choice(files)
  data = bytearray(file.read_bytes())
  match trial.random.choice(["cut", "altered", "removed"]):
    case "cut":
      file.write_bytes(data[: trial.random.randrange(len(data))])
    case "altered":
      data[trial.random.randrange(len(data))] ^= 1 << trial.random.randrange(8)
      file.write_bytes(data)
    case "removed":
      file.unlink()


def fill_the_disk(trial: trials.Trial, duration: float) -> str:
  """Runs on a disk that is too small, and later grows."""
  del duration
  with trials.disk(trial, size="1500k"):
    if not any(trials.end(trial.start())):
      raise RuntimeError("the run fitted on the small disk")
    said = trials.error_of(trial)
    subprocess.run(["mount", "-o", "remount,size=200m", str(trial.workdir)], check=True)
    trial.finish()
    trials.keep(trial)
  return said


def make_it_read_only(trial: trials.Trial, duration: float) -> str:
  """Starts a run on a read-only disk, which later becomes writable."""
  with trials.disk(trial, size="200m"):
    processes = trial.start()
    trials.wait_for(processes, (trial.workdir / "metrics.jsonl").exists)
    time.sleep(trial.random.uniform(0, duration / 4))
    # A disk with open files cannot be made read-only.
    trials.kill(processes)
    subprocess.run(["mount", "-o", "remount,ro", str(trial.workdir)], check=True)
    if not any(trials.end(trial.start())):
      raise RuntimeError("it wrote to a read-only disk")
    said = trials.error_of(trial)
    subprocess.run(["mount", "-o", "remount,rw", str(trial.workdir)], check=True)
    trial.finish()
    trials.keep(trial)
  return said


def weights_that_are_nan(trial: trials.Trial, duration: float) -> str:
  """Puts NaN into the UNet: the run must fail without saving, and resume once repaired."""
  del duration
  return _break_weights(trial, "unet", status=3)


def data_that_are_nan(trial: trials.Trial, duration: float) -> str:
  """Puts NaN into the VAE or the text encoder: refused before the first update."""
  del duration
  return _break_weights(trial, trial.random.choice(["vae", "text_encoder"]), status=2)


def _break_weights(trial: trials.Trial, part: str, *, status: int) -> str:
  processes = trial.start()
  trials.wait_for(processes, (trial.workdir / "checkpoints" / "20").exists)
  trials.kill(processes)
  broken = trial.directory / "broken"
  shutil.copytree(trial.model, broken)
  file = next((broken / part).glob("*.safetensors"))
  tensors = load_file(file)
  used = [
    name for name in sorted(tensors) if "decoder" not in name and "post_quant" not in name
  ]
  name = trial.random.choice(used)
  save_file(tensors | {name: np.full_like(tensors[name], np.nan)}, file)
  good, trial.model = trial.model, broken
  other = trial.workdir
  trial.workdir = trial.directory / "other"
  if status not in trials.end(trial.start()):
    raise RuntimeError(f"the NaN was not noticed: {trial.log()[-500:]}")
  saved = trial.workdir / "checkpoints"
  if saved.exists() and checkpoint_files.steps(saved):
    raise RuntimeError("non-finite weights were saved")
  said = trials.error_of(trial)
  trial.model, trial.workdir = good, other
  return said


def hang(trial: trials.Trial, duration: float) -> None:
  """Stops a process with SIGSTOP."""
  processes = trial.start()
  trials.wait_for(processes, (trial.workdir / "metrics.jsonl").exists)
  time.sleep(trial.random.uniform(0, duration / 4))
  trial.random.choice(processes).send_signal(signal.SIGSTOP)
  # JAX's heartbeat takes 100 seconds; the stopped process is killed after that.
  statuses = trials.end(processes)
  if statuses == [0] * len(statuses):
    raise trials.TooLateError
  if statuses.count(-signal.SIGKILL) != 1 or 0 in statuses:
    raise RuntimeError(f"the other process did not notice: {statuses}")


def a_second_run(trial: trials.Trial, duration: float) -> str:
  """Starts a second run on the same workdir, which must be refused."""
  processes = trial.start()
  trials.wait_for(processes, (trial.workdir / "config.json").exists)
  time.sleep(trial.random.uniform(0, duration / 4))
  second = subprocess.run(
    [sys.executable, "-m", "jaxpref.main", *trial.arguments()],
    cwd=trials.ROOT,
    env=trial.env,
    check=False,
    capture_output=True,
    encoding="utf-8",
  )
  if processes[0].poll() is not None:
    raise trials.TooLateError
  if any(trials.end(processes)):
    raise RuntimeError("the first run was harmed")
  if second.returncode != 2:
    raise RuntimeError(f"the second run ended with {second.returncode}")
  return second.stderr.strip().splitlines()[-1]


def jump_in_time(trial: trials.Trial, duration: float) -> str:
  """Moves the wall clock back and forth; Orbax may then report a timeout of a save."""
  clock = trial.directory / "clock"
  clock.write_text("+0", encoding="utf-8")
  before = dict(trial.env)
  trial.env |= {
    "LD_PRELOAD": FAKETIME,
    "FAKETIME_TIMESTAMP_FILE": str(clock),
    "FAKETIME_NO_CACHE": "1",
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # the monotonic clock cannot jump
  }
  processes = trial.start()
  for _ in range(6):
    time.sleep(duration / 8)
    clock.write_text(
      trial.random.choice(["+400d", "-400d", "+3h", "-3h", "-20s", "+0"]), encoding="utf-8"
    )
  if set(trials.end(processes)) - {0, 75}:
    raise RuntimeError(f"the run did not end with a clear error: {trial.log()[-500:]}")
  trial.env = before
  return trials.error_of(trial)


FAULTS: dict[str, tuple[Callable, str, int]] = {
  "kill -9 at any time": (kill_anywhere, "one process", 30),
  "kill -9 in a save": (kill_in_a_save, "one process", 16),
  "kill -9 in an iteration's save": (kill_in_a_save, "iterative", 6),
  "kill -9 in the evaluation": (kill_in_the_evaluation, "one process", 5),
  "kill -9 while data are generated": (kill_in_the_data, "one process", 4),
  "kill -9 while pairs are generated": (kill_in_the_pairs, "iterative", 6),
  "kill -9 of iterations at any time": (kill_anywhere, "iterative", 8),
  "kill -9 of one of two processes": (kill_one, "two processes", 10),
  "kill -9 of both processes": (kill_anywhere, "two processes", 6),
  "kill -9 of both in a save": (kill_in_a_save, "two processes", 6),
  "SIGTERM": (ask_to_stop, "one process", 8),
  "SIGTERM to one of two processes": (ask_to_stop, "two processes", 4),
  "damaged checkpoint": (damage_a_checkpoint, "one process", 15),
  "full disk": (fill_the_disk, "one process", 3),
  "read-only disk": (make_it_read_only, "one process", 3),
  "NaN in weights": (weights_that_are_nan, "one process", 2),
  "NaN in data": (data_that_are_nan, "one process", 4),
  "NaN in loss and gradient, killed": (kill_anywhere, "not finite", 4),
  "one of two processes hangs": (hang, "two processes", 2),
  "second run on the workdir": (a_second_run, "one process", 3),
  "clock jumps": (jump_in_time, "one process", 3),
}


def undisturbed(name: str, options: argparse.Namespace) -> tuple[str, float]:
  """Returns digest and seconds of an undisturbed run, the second, which need not compile."""
  for again in range(2):
    directory = options.runs / f"undisturbed {name} {again}"
    trial = trials.Trial(name, directory, options.model, [options.seed])
    began = time.monotonic()
    if any(trials.end(trial.start())):
      sys.exit(f"an undisturbed run failed: {trial.log()[-1000:]}")
    seconds = time.monotonic() - began
  return trials.digest(trial.workdir), seconds


def main(argv: list[str]) -> None:
  """Makes the missing trials, then writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--model", type=Path, help="a tiny pipeline; by default it is made")
  add("--out", type=Path, default=Path("docs/reliability"))
  add("--runs", type=Path, default=Path("runs/faults"))
  add("--faults", nargs="+", default=list(FAULTS), choices=FAULTS, metavar="FAULT")
  add("--trials", type=int, default=0, help="maximum number of trials per fault; 0: all")
  add("--seed", type=int, default=0)
  options = parser.parse_args(argv)
  options.runs = options.runs.resolve()
  options.runs.mkdir(parents=True, exist_ok=True)
  options.out.mkdir(parents=True, exist_ok=True)
  options.model = (options.model or trials.make_model(options.runs)).resolve()
  records = options.out / "trials.jsonl"
  lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
  found = [json.loads(line) for line in lines]
  done = {(r["fault"], r["number"]) for r in found}
  references: dict[str, tuple[str, float]] = {}
  for fault in options.faults:
    act, name, count = FAULTS[fault]
    for number in range(min(options.trials or count, count)):
      if (fault, number) in done:
        continue
      if name not in references:
        references[name] = undisturbed(name, options)
      directory = options.runs / f"{fault} {number}"
      for turn in range(trials.STARTS):
        seed = [options.seed, fault, number, turn]
        trial = trials.Trial(name, directory, options.model, seed)
        try:
          result = attempt(act, trial, references[name])
          break
        except trials.TooLateError:  # the next turn has another random time
          continue
      else:
        sys.exit(f"{fault} {number}: always too late")
      record = {"fault": fault, "number": number, **result}
      print(json.dumps(record), flush=True)
      with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
      found.append(record)
  write_report(found, options)


def attempt(act: Callable, trial: trials.Trial, reference: tuple[str, float]) -> dict:
  """Makes one trial; keeps its directory if it failed."""
  try:
    said = act(trial, reference[1]) or ""
    if trial.workdir.name != "copy":
      trial.finish()
    same = trials.digest(trial.workdir) == reference[0]
    problem = "" if same else "it ended with other numbers"
  except trials.TooLateError:
    raise
  except Exception as error:  # noqa: BLE001  # a failed trial is a result
    said, problem = "", f"{type(error).__name__}: {error}"
  if not problem:
    shutil.rmtree(trial.directory)
  return {"setting": trial.name, "starts": trial.starts, "said": said, "problem": problem}


def write_report(found: list[dict], options: argparse.Namespace) -> None:
  """Writes the table of `docs/reliability.md`."""
  lines = [
    f"{campaign.made_by('python benchmarks/faults.py')}, "
    f"orbax-checkpoint {metadata.version('orbax-checkpoint')}; seed {options.seed}; "
    f"{len(found)} trials.",
    "",
    "| fault | run | trials | ended with the same bits | starts, mean |",
    "|---|---|---|---|---|",
  ]
  groups = collections.defaultdict(list)
  for record in found:
    groups[record["fault"]].append(record)
  for fault in FAULTS:
    if rows := groups.get(fault):
      good = sum(not row["problem"] for row in rows)
      starts = np.mean([row["starts"] for row in rows])
      lines.append(f"| {fault} | {rows[0]['setting']} | {len(rows)} | {good} | {starts:.1f} |")
  said = {f"{row['fault']}: `{row['said']}`": None for row in found if row["said"]}
  lines += ["", "What runs said, one of each:", ""]
  first = {line.partition(":")[0]: line for line in reversed(said)}
  lines += [f"- {first[fault]}" for fault in FAULTS if fault in first]
  bad = [row for row in found if row["problem"]]
  if bad:
    lines += ["", "Failures:", ""]
    lines += [f"- {row['fault']} {row['number']}: {row['problem'][:300]}" for row in bad]
  campaign.write_into(campaign.document_of(options.out), "\n".join(lines))
  print("\n".join(lines))


if __name__ == "__main__":
  main(sys.argv[1:])
