"""Launchers: linted, validated, and run against stand-ins for the clouds."""

import copy
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sysconfig
import time

import jsonschema
import pytest
import yaml

from mmjax.verbs import train

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
  shellcheck = pathlib.Path(sysconfig.get_path("scripts")) / "shellcheck"
  subprocess.run(["bash", "-n", script], check=True)
  found = subprocess.run([shellcheck, script], capture_output=True, text=True)
  assert not found.returncode, found.stdout
  assert os.access(script, os.X_OK)


# --- host.sh ------------------------------------------------------------------


def stand_in(folder, name, text):
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)
  return path


def host(folder, body, **environ):
  """Starts host.sh with a stand-in for mmjax that runs `body`."""
  command = stand_in(folder, "fake", f'echo "$@" >>{folder}/calls\n{body}')
  environ = {"MMJAX_COMMAND": str(command), "MMJAX_PAUSE": "0"} | environ
  return subprocess.Popen(
      [LAUNCH / "host.sh", "--config", "a b"],
      env=os.environ | environ,
      stderr=subprocess.PIPE,
      text=True,
  )


def calls(folder):
  return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    "code, attempts, message",
    [
        (0, 1, "training is complete"),
        (1, 1, "the message above says what is wrong"),
        (3, 1, "training is unstable"),
        (5, 3, "another process of the job ended"),
        (134, 3, "process 0 ended, or not all"),
        (137, 3, "not enough memory"),
        (77, 3, "crashed (exit code 77)"),
    ],
)
def test_a_host_tries_again_what_can_get_better(
    tmp_path, code, attempts, message
):
  process = host(tmp_path, f"exit {code}", MMJAX_ATTEMPTS="3")
  _, errors = process.communicate(timeout=20)
  assert process.returncode == code
  assert message in errors.splitlines()[-1]
  assert calls(tmp_path) == ["train --distributed --config a b"] * attempts


def test_a_host_without_mmjax_says_so(tmp_path):
  process = host(tmp_path, "", MMJAX_COMMAND="no-such-command")
  _, errors = process.communicate(timeout=20)
  assert process.returncode == 127
  assert "cannot run no-such-command; is mmjax installed" in errors


def test_a_host_passes_signals_on_and_waits(tmp_path):
  body = f"""
trap 'sleep 0.5; echo saved >>{tmp_path}/calls; exit 143' TERM
touch {tmp_path}/ready
while :; do sleep 0.05; done"""
  process = host(tmp_path, body)
  for _ in range(200):
    if (tmp_path / "ready").exists():
      break
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=20)
  assert process.returncode == 143
  assert calls(tmp_path)[1:] == ["saved"]
  assert "stopped by a signal; the state is saved" in errors


# --- TPU VMs, XPK, Slurm: what they would run ---------------------------------


def run(folder, script, *arguments, fakes, code=0, **environ):
  """Runs a script with stand-ins that write down their arguments."""
  for name, body in fakes.items():
    calls = f"{folder}/{name}.calls"
    record = f'{{ printf "%s\\n" "$@"; echo; }} >>{calls}\n'
    stand_in(folder, name, record + body)
  path = f"{folder}:{os.environ['PATH']}"
  found = subprocess.run(
      [LAUNCH / script, *arguments],
      env=os.environ | {"PATH": path} | environ,
      capture_output=True,
      text=True,
  )
  assert found.returncode == code, found.stderr
  return found.stderr


def recorded(folder, name):
  """The argument lists that a stand-in was called with."""
  calls = folder / f"{name}.calls"
  if not calls.exists():
    return []
  text = calls.read_text().rstrip("\n")
  return [call.split("\n") for call in text.split("\n\n")]


TPU = dict(fakes={"gcloud": ""}, NAME="pod", ZONE="here")


def test_tpu_vm_creates_a_slice(tmp_path):
  run(
      tmp_path, "tpu_vm.sh", "create", **TPU, TYPE="v5litepod-16",
      VERSION="v2", SPOT="1",
  )
  assert recorded(tmp_path, "gcloud") == [[
      "compute", "tpus", "tpu-vm", "create", "pod", "--zone=here",
      "--accelerator-type=v5litepod-16", "--version=v2", "--spot",
  ]]


def test_tpu_vm_trains_through_the_script_of_all_hosts(tmp_path):
  config = "--config=configs/clip.py:size=b16,stage=a b"
  run(tmp_path, "tpu_vm.sh", "train", config, **TPU)
  (call,) = recorded(tmp_path, "gcloud")
  assert call[3:7] == ["ssh", "pod", "--zone=here", "--worker=all"]
  command = call[7].removeprefix("--command=")
  home = tmp_path / "home"
  (home / "mmjax" / "launch").mkdir(parents=True)
  stand_in(home / "mmjax" / "launch", "host.sh", 'printf "<%s>" "$@"')
  subprocess.run(
      ["bash", "-c", command], env=os.environ | {"HOME": str(home)}, cwd=home
  )
  for _ in range(100):
    if (home / "train.log").exists() and (home / "train.log").read_text():
      break
    time.sleep(0.05)
  assert (home / "train.log").read_text() == f"<{config}>"


def test_tpu_vm_says_what_is_missing(tmp_path):
  errors = run(
      tmp_path, "tpu_vm.sh", "train", fakes={}, code=1, NAME="", ZONE="x"
  )
  assert "say which slice: NAME=" in errors
  errors = run(tmp_path, "tpu_vm.sh", "trian", **TPU, code=1)
  assert "trian: expected create, setup" in errors


def test_xpk_runs_the_script_of_all_hosts(tmp_path):
  run(
      tmp_path, "xpk.sh", "--config", "a b", fakes={"xpk": ""},
      CLUSTER="c", PROJECT="p", ZONE="z", TYPE="t", NAME="n", IMAGE="i",
  )
  (call,) = recorded(tmp_path, "xpk")
  assert call[:2] == ["workload", "create"]
  assert call[-1] == r"--command=launch/host.sh --config a\ b"


@pytest.mark.parametrize("code, requeued", [(0, 0), (1, 0), (143, 1)])
def test_slurm_requeues_what_ran_out_of_time(tmp_path, code, requeued):
  fakes = {"srun": f"exit {code}", "scontrol": ""}
  run(
      tmp_path, "slurm.sbatch", "--config", "a b", fakes=fakes, code=code,
      SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7",
  )
  (call,) = recorded(tmp_path, "srun")
  assert call[2:] == ["launch/host.sh", "--config", "a b"]
  assert recorded(tmp_path, "scontrol") == [["requeue", "7"]] * requeued


def test_slurm_asks_for_one_process_a_gpu_and_time_to_save():
  text = (LAUNCH / "slurm.sbatch").read_text()
  options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert options["signal"] == "TERM@120" and "requeue" in options
  known = {
      "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive",
      "cpus-per-task", "time", "signal", "requeue", "open-mode", "output",
  }
  assert set(options) <= known


# --- GKE ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema():
  found = json.loads((ROOT / "tests/launch/jobset.schema.json").read_text())
  jsonschema.Draft202012Validator.check_schema(found)
  return jsonschema.Draft202012Validator(found)


@pytest.fixture(scope="module")
def jobset():
  return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def job_of(jobset):
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_jobset_is_valid(schema, jobset):
  assert not [error.message for error in schema.iter_errors(jobset)]
  job = job_of(jobset)
  pod = job["template"]["spec"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  (container,) = pod["containers"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  hosts = math.prod(map(int, topology.split("x"))) // chips
  assert job["parallelism"] == job["completions"] == hosts
  volumes = {volume["name"] for volume in pod["volumes"]}
  assert {mount["name"] for mount in container["volumeMounts"]} == volumes
  assert container["command"] == ["launch/host.sh"]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda found: found["spec"].update(maxRestarts=3),
        lambda found: job_of(found).update(paralelism=4),
        lambda found: job_of(found)["template"]["spec"].update(
            restartPolicy="Always"
        ),
        lambda found: found["metadata"].update(name="Not_a_label"),
    ],
)
def test_the_schema_finds_mistakes(schema, jobset, break_it):
  broken = copy.deepcopy(jobset)
  break_it(broken)
  assert not schema.is_valid(broken)


def test_hopeless_exit_codes_are_those_of_the_host_script(jobset):
  (rule,) = job_of(jobset)["podFailurePolicy"]["rules"]
  script = (LAUNCH / "host.sh").read_text()
  final = re.search(r"^    ([\d |]+)\) return 1 ;;$", script, re.M)[1]
  assert {0, 130, 143, *rule["onExitCodes"]["values"]} == {
      int(code) for code in final.split("|")
  }


def test_the_jobset_trains_a_config_that_exists(jobset, capsys):
  (container,) = job_of(jobset)["template"]["spec"]["containers"]
  flags = container["args"]
  assert train.main([*flags, "--help"]) == 0
  with_typo = [flags[0], "--wrokdir=/bucket"]
  assert train.main(with_typo) == 1
  assert "did you mean 'workdir'" in capsys.readouterr().err
