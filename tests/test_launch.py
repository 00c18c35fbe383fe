"""The scripts of launch/: correct shell, and what they would do."""

import os
import shlex
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

from jaxpref import config, main
from jaxpref.runtime import distributed

LAUNCH = ROOT / "launch"
RUN = ["--config=configs/dro.py:tiny", "--workdir=runs/a b", "--config.optim.lr=1e-4"]


def dry(script, *arguments, **env):
  """The commands that a script would run, each as its words."""
  done = subprocess.run(
    ["bash", str(LAUNCH / script), *arguments],
    env=os.environ | {"DRY_RUN": "1"} | env,
    check=True,
    capture_output=True,
    text=True,
  )
  # Quoted as bash reads it.
  parse = 'eval "set -- $0"; printf "%s\\0" "$@"'
  return [
    subprocess.run(["bash", "-c", parse, line], check=True, capture_output=True, text=True)
    .stdout.rstrip("\0")
    .split("\0")
    for line in done.stdout.splitlines()
  ]


def check_run(words):
  """That they start our program with these arguments; returns its flags."""
  at = words.index("jaxpref.main")
  assert words[at - 1] == "-m"
  parsed, flags = config.parse_args(words[at + 1 :], flags=main.FLAGS)
  assert parsed.optim.lr == 1e-4 and flags["workdir"] == "runs/a b"
  return flags


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.s*")))
def test_the_shell_is_correct(script):
  shellcheck = shutil.which("shellcheck")
  assert shellcheck
  done = subprocess.run(
    [shellcheck, str(LAUNCH / script)], check=False, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout
  assert os.access(LAUNCH / script, os.X_OK) or script.endswith(".sbatch")


def test_local_cluster(monkeypatch):
  monkeypatch.chdir(ROOT)
  commands = dry("local_cluster.sh", "3", "2", *RUN, PORT="4321")
  assert len(commands) == 3
  for index, words in enumerate(commands):
    flags = check_run(words)
    assert distributed._settings(flags) == {
      "coordinator_address": "127.0.0.1:4321",
      "num_processes": 3,
      "process_id": index,
    }
    assert words[0] == "JAX_PLATFORMS=cpu"
    assert words[1].endswith(" --xla_force_host_platform_device_count=2")


def test_slurm(monkeypatch):
  monkeypatch.chdir(ROOT)
  (words,) = dry("slurm.sbatch", *RUN)
  assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
  assert distributed._settings(check_run(words)) == {}
  # Told in time to save, and queued again.
  text = (LAUNCH / "slurm.sbatch").read_text()
  assert "\n#SBATCH --signal=TERM@300\n" in text and "\n#SBATCH --requeue\n" in text


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (3, False), (143, True)])
def test_slurm_queues_again_what_was_stopped(tmp_path, status, again):
  for name, text in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/said')):
    (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / name).chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  env = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
  done = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), *RUN], env=env, check=False)
  assert done.returncode == status
  said = tmp_path / "said"
  assert (said.read_text() == "requeue 7\n") if again else not said.exists()


def test_tpu_pod(monkeypatch):
  monkeypatch.chdir(ROOT)
  slice_ = {"NAME": "n", "ZONE": "z", "TYPE": "v4-32", "BUCKET": "b"}
  for step, *wanted in (
    ("create", "create n --accelerator-type=v4-32"),
    ("install", "git archive", "scp", "pip install -q -e '.[tpu,gcs]'", "gcsfuse"),
    ("stop", "pkill -f '[b]ash run.sh'; pkill -TERM"),
    ("delete", "delete n --quiet"),
  ):
    commands = dry("tpu_pod.sh", step, **slice_)
    assert len(commands) == len(wanted)
    for words, text in zip(commands, wanted, strict=True):
      if text != "git archive":
        assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] and "--zone=z" in words
      assert text in " ".join(words)
  (words,) = dry("tpu_pod.sh", "run", *RUN, **slice_)
  assert "--worker=all" in words
  (command,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
  assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
  (start,) = (line for line in command.splitlines() if "-m jaxpref.main" in line)
  flags = check_run(shlex.split(start))
  assert flags["coordinator"] == "auto"


def test_gke_jobset():
  jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
  assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
  (hosts,) = jobset["spec"]["replicatedJobs"]
  assert hosts.keys() == {"name", "replicas", "template"}
  # Its template is a Job's, of which Kubernetes publishes the schema.
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hosts"}}
  version = kubernetes_validate.latest_version()
  kubernetes_validate.validate(job | hosts["template"], version, strict=True)
  spec = hosts["template"]["spec"]
  assert spec["parallelism"] == spec["completions"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  words = container["command"] + container["args"]
  parsed, flags = config.parse_args(words[3:], flags=main.FLAGS)
  assert parsed.preset == "sd15" and flags["coordinator"] == "auto"
  # Every host's chips make the topology.
  rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert int(rows) * int(columns) == chips * spec["parallelism"]


@pytest.mark.parametrize("script", [["gpu_host.sh"], ["local_devices.sh", "8"]])
def test_one_host(script, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = dry(*script, *RUN)[-1]
  assert check_run(words).keys() == {"workdir"}
  if "8" in script:
    assert words[1].startswith("XLA_FLAGS=") and words[1].endswith("device_count=8")


@pytest.mark.parametrize(
  ("script", "text"),
  [
    (["local_cluster.sh"], "usage:"),
    (["local_cluster.sh", "x", "2", "--config=y"], "usage:"),
    (["local_devices.sh"], "usage:"),
    (["tpu_pod.sh"], "the name of the slice"),
    (["tpu_pod.sh", "run"], "usage:"),
  ],
)
def test_usage(script, text):
  done = subprocess.run(
    ["bash", str(LAUNCH / script[0]), *script[1:]],
    env=os.environ | ({"NAME": "n", "ZONE": "z"} if script[1:] == ["run"] else {}),
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode and text in done.stderr
