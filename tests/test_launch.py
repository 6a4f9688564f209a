"""Starting runs: what is checked before, what is written for each target, and how processes are looked after."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from kill_and_resume import CONFIG

from bvl import cli
from bvl.errors import ConfigError, UserError
from bvl.launch import gke, local, slurm, tpu_vm
from bvl.launch.job import Job, change_folder, jobs_of


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def bare_path(monkeypatch, tmp_path):
    """A PATH without the programs of any cluster; the folder is the place for false ones."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def run(*words):
    """Exit code of a command line, whether it returns or exits."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


class TestJobs:
    def test_one_run(self, config):
        (job,) = jobs_of(config, ["workdir=runs/a", "seed=3"], force=True)
        assert job.words == ("train", config, "seed=3", "workdir=runs/a", "--force")
        assert (job.workdir, job.name) == ("runs/a", "")

    def test_a_sweep_is_a_product_with_folders_of_their_own(self, config):
        jobs = jobs_of(config, ["workdir=runs/a"], ["optim.lr=1e-3,3e-4", "seed=0,1"])
        assert [job.workdir for job in jobs] == [
            "runs/a/optim.lr=1e-3__seed=0",
            "runs/a/optim.lr=1e-3__seed=1",
            "runs/a/optim.lr=3e-4__seed=0",
            "runs/a/optim.lr=3e-4__seed=1",
        ]
        assert jobs[2].words[2:] == ("optim.lr=3e-4", "seed=0", f"workdir={jobs[2].workdir}")

    def test_names_are_safe_and_different(self, config):
        jobs = jobs_of(config, ["workdir=w"], ["init_from=runs/a b,runs/a/b," + "x" * 300])
        names = [job.name for job in jobs]
        assert names[:2] == ["init_from=runs_a_b", "init_from=runs_a_b_2"]
        assert len(names[2]) <= 150
        # The values are what was written.
        assert "init_from=runs/a b" in jobs[0].words

    def test_commas_in_brackets_do_not_part_values(self, config):
        jobs = jobs_of(config, ["workdir=w"], ["init_include=('a','b'),('c',)"])
        assert ["init_include=('a','b')", "init_include=('c',)"] == [job.words[2] for job in jobs]

    @pytest.mark.parametrize(
        "overrides, sweeps, part",
        [
            ([], [], "workdir=DIR"),
            (["workdir=w"], ["optim.lrr=1,2"], "nearest is 'optim.lr'"),
            (["workdir=w"], ["seed=1,x"], "seed='x' is not int"),
            (["workdir=w"], ["seed"], "--sweep seed: give a key and its values"),
            (["workdir=w"], ["seed="], "--sweep seed=: give a key and its values"),
            (["workdir=w"], ["seed=1,"], "give a key and its values"),
            (["workdir=w"], ["seed=1,1"], "1 is there twice"),
            (["workdir=w"], ["seed=1", "seed=2"], "given twice"),
            (["workdir=w", "seed=1"], ["seed=2,3"], "one value on the command line and several"),
            ([], ["workdir=a,b"], "a folder of its own"),
            (["workdir=w", "steps=5,6"], ["seed=2,3"], "--sweep steps=5,6"),
        ],
    )
    def test_errors_come_before_anything_starts(self, config, overrides, sweeps, part):
        with pytest.raises(ConfigError, match=part.replace("(", r"\(")):
            jobs_of(config, overrides, sweeps)


class TestCommandLine:
    def test_wrong_usage(self, config, capsys):
        assert run("launch", config, "workdir=w", "--on", "slrum") == 2
        assert "invalid choice: 'slrum'" in capsys.readouterr().err
        assert run("launch", config, "workdir=w", "--on", "local", "--hosts", "0") == 2
        assert "'0' is not a whole number above 0" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words, part",
        [
            (
                ["--on", "slurm", "--hosts", "2", "--gpus-per-node", "a100:3"],
                "batch_size=8 cannot be split over 6",
            ),
            (
                ["--on", "local", "--devices-per-host", "6", "mesh.shape=(4,1,1)"],
                "needs 4 devices, there are 6",
            ),
            (["--on", "gke", "--image", "i", "mesh.hosts=3"], "mesh.hosts=3, but 1 process"),
        ],
    )
    def test_hosts_and_devices_that_the_config_does_not_take(self, config, words, part, capsys):
        assert run("launch", config, "workdir=w", *words, "--dry-run") == 1
        assert part in capsys.readouterr().err
        # On a TPU nobody knows here.
        assert run("launch", config, "workdir=w", "mesh.hosts=3", "mesh.shape=(4,1,1)", "--on", "tpu-vm",
                   "--tpu", "t", "--zone", "z", "--dry-run") == 0  # fmt: skip

    @pytest.mark.parametrize("target", ["local", "slurm"])
    def test_jobs_without_a_sweep(self, config, target, capsys):
        words = ("launch", config, "workdir=w", "--on", target, "--jobs", "2", "--dry-run")
        assert run(*words) == 1
        assert "--jobs goes with --sweep" in capsys.readouterr().err
        assert run(*words, "--sweep", "seed=1,2") == 0

    def test_options_of_another_target(self, config, capsys):
        assert run("launch", config, "workdir=w", "--on", "local", "--partition", "gpu") == 1
        assert "--on local takes no --partition; it takes --hosts" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "target, options, program",
        [
            ("slurm", [], "sbatch"),
            ("tpu-vm", ["--tpu", "t", "--zone", "z"], "gcloud"),
            ("gke", ["--image", "i"], "kubectl"),
        ],
    )
    def test_missing_programs(self, config, target, options, program, capsys, tmp_path, bare_path):
        words = ("launch", config, f"workdir={tmp_path / 'w'}", "--on", target, *options)
        assert run(*words) == 1
        error = capsys.readouterr().err
        assert f"{program} is not on the PATH" in error and "--dry-run" in error
        assert run(*words, "--dry-run") == 0
        assert str(tmp_path / "w") in capsys.readouterr().out
        assert not (tmp_path / "w").exists()


def script_of(runs, **options):
    return slurm.script(runs, slurm.Options(**options))


def sbatch_options(text):
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line.removeprefix("#SBATCH --"))[0] for line in lines]
    return dict(word.partition("=")[::2] for word in words)


JOB = Job(("train", "my config.py", "workdir=runs/a"), "runs/a")
SWEEP = [
    Job(("train", "c.py", f"seed={i}", f"workdir=w/seed={i}"), f"w/seed={i}", f"seed={i}") for i in (4, 5)
]


class TestSlurm:
    def test_options(self):
        text = script_of(
            [JOB], hosts=2, partition="gpu", time="1:00:00", gpus_per_node="a100:4", cpus_per_task=8, grace=60,
            sbatch_option=("constraint=a b", "exclusive"),
        )  # fmt: skip
        options = sbatch_options(text)
        assert options["nodes"] == "2" and options["ntasks-per-node"] == "1"
        assert options["partition"] == "gpu" and options["time"] == "1:00:00"
        assert options["gpus-per-node"] == "a100:4" and options["constraint"] == "a b"
        assert options["signal"] == "USR1@60" and options["open-mode"] == "append"
        assert {"requeue", "exclusive"} <= options.keys() and "array" not in options
        assert options["job-name"] == "a" and "account" not in options
        assert "--cpus-per-task=8" in text.partition("srun")[2]

    def test_sweep_is_an_array(self):
        options = sbatch_options(script_of(SWEEP, jobs=1, name="n"))
        assert options["array"] == "0-1%1" and options["job-name"] == "n"
        assert options["output"].endswith("/w/logs/slurm-%A_%a.log")

    def test_wrong_option(self):
        with pytest.raises(UserError, match="--sbatch-option --x"):
            slurm.Options(sbatch_option=("--x",))

    def test_percent_signs_of_folders_are_no_placeholders(self):
        text = script_of([Job(("train",), "/runs/50%t")])
        assert "/runs/50%%t/logs/slurm-%j.log" in text and "/runs/50%%t/logs/host%t.log" in text

    def test_submission(self, config, bare_path, tmp_path, capsys):
        (bare_path / "sbatch").write_text('#!/bin/sh\nshift\nread -r line <"$1"\necho "17;cluster"\n')
        (bare_path / "sbatch").chmod(0o755)
        assert run("launch", config, f"workdir={tmp_path / 'w'}", "--on", "slurm", "--sweep", "seed=1,2") == 0
        out = capsys.readouterr().out
        assert "submitted job 17 (2 run(s))" in out
        assert (tmp_path / "w/logs").is_dir() and (tmp_path / "w/seed=2/logs").is_dir()
        assert (tmp_path / "w/launch/job.sbatch").read_text().startswith("#!/bin/bash\n#SBATCH --")

    # The script itself, with a false srun that says what it was given, and ends with $CODE.
    SRUN = """#!/bin/bash
        printf '%s\\n' "$@" >>"$SEEN"
        trap 'echo got USR1 >>"$SEEN"; exit 143' USR1
        echo ready >>"$SEEN"
        [ -n "$LONG" ] && for _ in $(seq 100); do sleep 0.1; done
        exit "$CODE"
    """

    @pytest.fixture
    def start(self, tmp_path):
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "srun").write_text(self.SRUN)
        (programs / "scontrol").write_text('#!/bin/bash\necho "scontrol $*" >>"$SEEN"\n')
        for file in programs.iterdir():
            file.chmod(0o755)
        seen = tmp_path / "seen"

        def start(text, *, code=0, long=False, **environment):
            file = tmp_path / "job.sbatch"
            file.write_text(text)
            assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
            values = {"PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(seen), "SLURM_JOB_ID": "17"}
            values |= {"CODE": str(code), "LONG": "1" if long else ""} | environment
            process = subprocess.Popen(
                ["bash", str(file)], env=os.environ | values, stdout=subprocess.DEVNULL
            )
            process.seen = lambda: seen.read_text() if seen.exists() else ""
            if long:
                until(lambda: "ready" in process.seen())
            return process

        return start

    def test_command_of_the_right_run(self, start):
        process = start(script_of(SWEEP), SLURM_ARRAY_TASK_ID="1")
        assert process.wait(20) == 0
        words = process.seen().splitlines()
        assert words[-8:-1] == [
            sys.executable,
            "-m",
            "bvl.cli",
            "train",
            "c.py",
            "seed=5",
            "workdir=w/seed=5",
        ]
        assert f"--output={Path('w/seed=5/logs').absolute()}/host%t.log" in words
        assert "scontrol" not in process.seen()

    def test_words_with_blanks_stay_whole(self, start):
        process = start(script_of([JOB]))
        process.wait(20)
        assert "my config.py" in process.seen().splitlines()

    @pytest.mark.parametrize("setup, code", [("false  # a comment", 1), ("export CODE=7", 7)])
    def test_setup_that_fails_ends_the_job(self, start, setup, code):
        process = start(script_of([JOB], setup=setup))
        assert process.wait(20) == code
        assert ("ready" in process.seen()) == (code == 7)

    @pytest.mark.parametrize(
        "code, options, environment, requeued",
        [
            (143, {}, {}, True),
            (1, {}, {}, False),
            # A lost host, which might be lost again and again.
            (75, {}, {}, False),
            (75, {"restarts": 2}, {}, True),
            (75, {"restarts": 2}, {"SLURM_RESTART_COUNT": "2"}, False),
            (143, {"restarts": 2}, {"SLURM_RESTART_COUNT": "1"}, True),
            (143, {"restarts": 2}, {"SLURM_RESTART_COUNT": "2"}, False),
        ],
    )
    def test_requeue(self, start, code, options, environment, requeued):
        process = start(script_of([JOB], **options), code=code, **environment)
        assert process.wait(20) == code
        assert ("scontrol requeue 17" in process.seen()) == requeued

    def test_a_signal_to_the_script_reaches_the_run_which_is_waited_for(self, start):
        process = start(script_of([JOB]), long=True)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 143
        assert process.seen().splitlines()[-2:] == ["got USR1", "scontrol requeue 17"]

    def test_a_cancelled_job_does_not_come_back(self, start):
        process = start(script_of([JOB]), code=143, long=True)
        # Slurm sends both: SIGTERM to the script, and to the tasks, which here end by another signal.
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 143
        assert "got USR1" in process.seen() and "scontrol" not in process.seen()


class TestTpuVm:
    def test_command(self):
        options = tpu_vm.Options(
            tpu="my-tpu", zone="z1", project="p", directory="~/my code", setup=". env/bin/activate"
        )
        words = tpu_vm.command(JOB, options)
        assert words[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--worker=all"]
        assert {"--zone=z1", "--project=p"} <= set(words)
        remote = words[-1].removeprefix("--command=")
        assert remote == (
            "cd ~/'my code' && . env/bin/activate && "
            "BVL_DISTRIBUTED=auto bvl train 'my config.py' workdir=runs/a"
        )

    def test_dry_run_prints_a_line_for_the_shell(self, capsys):
        options = tpu_vm.Options(tpu="t", zone="z")
        assert tpu_vm.launch([JOB], options, dry_run=True) == 0
        assert shlex.split(capsys.readouterr().out) == tpu_vm.command(JOB, options)

    def test_runs_and_hands_on_the_exit_code(self, bare_path):
        (bare_path / "gcloud").write_text("#!/bin/sh\nexit 7\n")
        (bare_path / "gcloud").chmod(0o755)
        assert tpu_vm.launch([JOB], tpu_vm.Options(tpu="t", zone="z")) == 7

    def test_names_are_needed(self):
        with pytest.raises(UserError, match="--zone is missing"):
            tpu_vm.Options(tpu="t")

    @pytest.mark.parametrize("folder, text", [("a b", "cd 'a b'"), ("~/", "cd ~/"), ("~/x y", "cd ~/'x y'")])
    def test_change_folder(self, folder, text):
        assert change_folder(folder) == text


class TestGke:
    def tree(self, jobs=(JOB,), **options):
        text = gke.manifest(jobs, gke.Options(image="registry/bvl:1", **options))
        return list(yaml.safe_load_all(text))

    def test_hosts_find_each_other(self):
        (tree,) = self.tree(hosts=4)
        name = tree["metadata"]["name"]
        assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert tree["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": name}
        (replicated,) = tree["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
        (container,) = job["template"]["spec"]["containers"]
        assert container["command"] == ["bvl", "train", "my config.py", "workdir=runs/a"]
        env = {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}
        host, _, port = env["BVL_COORDINATOR"].partition(":")
        # <JobSet>-<replicated job>-<index of the job>-<index of the pod>.<subdomain>
        assert host == f"{name}-{replicated['name']}-0-0.{name}" and int(port) > 1024
        assert env["BVL_NUM_PROCESSES"] == "4"
        assert env["BVL_PROCESS_ID"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"

    def test_exit_codes(self):
        (tree,) = self.tree(grace=77, restarts=5)
        job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
        rules = [(r["action"], r["onExitCodes"]["values"]) for r in job["podFailurePolicy"]["rules"]]
        assert rules == [("Ignore", [143]), ("FailJob", [1, 2])]
        pod = job["template"]["spec"]
        # A policy of failures needs it.
        assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 77
        policy = tree["spec"]["failurePolicy"]
        assert policy["maxRestarts"] == 5
        # What a pod's exit code has settled is not tried again.
        (rule,) = policy["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
        # One process needs no coordinator.
        assert "env" not in pod["containers"][0]

    @pytest.mark.parametrize(
        "options, resource, labels",
        [
            (
                {"accelerator": "tpu-v5-lite-podslice", "topology": "2x4"},
                "google.com/tpu",
                {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "2x4"},
            ),
            ({"accelerator": "nvidia-l4"}, "nvidia.com/gpu", {"gke-accelerator": "nvidia-l4"}),
        ],
    )
    def test_accelerators(self, options, resource, labels):
        (tree,) = self.tree(**options, devices_per_host=4, cpus_per_task=8, memory="64Gi", namespace="n")
        pod = tree["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        assert resources["limits"] == {resource: 4}
        assert resources["requests"] == {"cpu": 8, "memory": "64Gi", resource: 4}
        assert pod["nodeSelector"] == {f"cloud.google.com/{key}": value for key, value in labels.items()}
        assert tree["metadata"]["namespace"] == "n"

    def test_volume_and_folder(self):
        (tree,) = self.tree(volume="disk:/data", directory="/data/work")
        pod = tree["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        claims = {v["name"]: v.get("persistentVolumeClaim") for v in pod["volumes"]}
        assert claims[mounts["/data"]] == {"claimName": "disk"} and "/dev/shm" in mounts
        assert container["workingDir"] == "/data/work"

    def test_names(self):
        trees = self.tree(SWEEP, name="My Sweep!")
        assert [tree["metadata"]["name"] for tree in trees] == ["my-sweep-0", "my-sweep-1"]
        (tree,) = self.tree([Job(("train",), "runs/" + "9" * 80)])
        assert tree["metadata"]["name"].startswith("bvl-9") and len(tree["metadata"]["name"]) < 50

    @pytest.mark.parametrize(
        "options, part",
        [
            ({"image": None}, "--image"),
            ({"topology": "2x4"}, "goes with --accelerator tpu"),
            ({"accelerator": "tpu-v4-podslice", "devices_per_host": 4}, "needs --topology"),
            ({"accelerator": "nvidia-l4"}, "--devices-per-host"),
            ({"devices_per_host": 4}, "of which --accelerator"),
            ({"volume": "disk"}, "CLAIM:PATH"),
        ],
    )
    def test_wrong_options(self, options, part):
        with pytest.raises(UserError, match=part):
            gke.Options(**{"image": "i"} | options)

    def test_apply(self, bare_path, tmp_path, capsys):
        (bare_path / "kubectl").write_text(f'#!/bin/sh\n/bin/cat >"{tmp_path}/applied"\necho "$*"\n')
        (bare_path / "kubectl").chmod(0o755)
        assert gke.launch([JOB], gke.Options(image="i", namespace="n")) == 0
        assert yaml.safe_load((tmp_path / "applied").read_text())["kind"] == "JobSet"
        assert "--volume" in capsys.readouterr().err


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def script_job(tmp_path, text, name="w", monkeypatch=None):
    """A job whose processes run a Python text instead of bvl."""
    file = tmp_path / f"{name}.py"
    file.write_text("import os, signal, sys, time\nhost = os.environ.get('BVL_PROCESS_ID', '0')\n" + text)

    class Scripted(Job):
        @property
        def here(self):
            return [sys.executable, str(file)]

    return Scripted(("train",), str(tmp_path / name), name)


class TestLocal:
    @pytest.fixture(autouse=True)
    def without_gpus(self, monkeypatch):
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def test_variables(self):
        options = local.Options(hosts=2, devices_per_host=3)
        values = local.variables(options, 1, 999)
        assert values == {
            "BVL_COORDINATOR": "127.0.0.1:999",
            "BVL_NUM_PROCESSES": "2",
            "BVL_PROCESS_ID": "1",
            "JAX_NUM_CPU_DEVICES": "3",
        }
        assert local.variables(local.Options(), 0, 999) == {}

    def test_gpus_are_shared_out(self, tmp_path):
        for number in (0, 1, 10, 2):
            (tmp_path / f"nvidia{number}").touch()
        (tmp_path / "nvidiactl").touch()
        gpus = local.gpus_here({}, tmp_path)
        assert gpus == ["0", "1", "2", "10"]
        assert local.gpus_here({"JAX_PLATFORMS": "cpu"}, tmp_path) == []
        assert local.gpus_here({"CUDA_VISIBLE_DEVICES": "3,4"}, tmp_path) == ["3", "4"]
        shares = [local.variables(local.Options(hosts=2), h, 1, gpus)["CUDA_VISIBLE_DEVICES"] for h in (0, 1)]
        assert shares == ["0,1", "2,10"]
        with pytest.raises(UserError, match=r"4 GPU\(s\)"):
            local.variables(local.Options(hosts=3, devices_per_host=2), 0, 1, gpus)

    def test_runs_at_the_same_time_share_no_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(local, "gpus_here", lambda: ["4", "5", "6"])
        text = "print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
        jobs = [script_job(tmp_path, text, name) for name in "abc"]
        # More at the same time than there are runs would leave GPUs unused.
        assert local.launch(jobs, local.Options(jobs=4)) == 0
        used = [Path(job.logs, "host0.log").read_text().strip() for job in jobs]
        assert sorted(used) == ["4", "5", "6"]
        with pytest.raises(UserError, match="each run needs one"):
            local.launch(jobs * 2, local.Options(jobs=4))

    def test_logs_and_echo(self, tmp_path, capsys):
        job = script_job(tmp_path, "print('I am', host, os.environ['BVL_NUM_PROCESSES'])")
        assert local.launch([job], local.Options(hosts=2)) == 0
        assert capsys.readouterr().out == "I am 0 2\n"
        assert Path(job.logs, "host1.log").read_text() == "I am 1 2\n"

    def test_ctrl_c_of_a_terminal_does_not_reach_the_processes_twice(self, tmp_path, capsys):
        assert local.launch([script_job(tmp_path, "print(os.getpgid(0))")], local.Options()) == 0
        assert int(capsys.readouterr().out) != os.getpgid(0)

    def test_the_run_goes_on_where_nobody_reads_what_it_says(self, tmp_path):
        job = script_job(tmp_path, "for _ in range(5): print('a line', flush=True); time.sleep(0.15)")
        text = f"""
import sys
from bvl.launch import local
from bvl.launch.job import Job
Job.here = property(lambda self: [sys.executable, {str(tmp_path / "w.py")!r}])
sys.exit(local.launch([Job(("train",), {job.workdir!r})], local.Options()))
"""
        process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
        assert Path(job.logs, "host0.log").read_text() == "a line\n" * 5

    def test_failing_host_is_named_and_ends_the_others(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(local, "TIME_TO_FAIL", 0.2)
        monkeypatch.setattr(local, "TIME_TO_END", 0.2)
        # Host 0 hangs, and hears nothing.
        text = "if host == '1': sys.exit('no such file')\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(20)\nprint('still here')"
        job = script_job(tmp_path, text)
        Path(job.logs).mkdir(parents=True)
        Path(job.logs, "host1.log").write_text("of an earlier start\n")
        assert local.launch([job], local.Options(hosts=2)) == 1
        out, error = capsys.readouterr()
        assert "host 1 of" in error and "exit code 1" in error and "no such file" in error
        assert "still here" not in out and "earlier start" not in error

    @pytest.mark.parametrize(
        "delay, end, code", [(0, "sys.exit(3)", 3), (0.6, "os.kill(os.getpid(), 9)", 137)]
    )
    def test_who_has_lost_a_host_is_not_the_one_that_failed(
        self, tmp_path, delay, end, code, capsys, monkeypatch
    ):
        """Whether both ends are seen at once, or the other's first."""
        monkeypatch.setattr(local, "POLL", 0.4)
        text = f"if host == '0': sys.exit(75)\ntime.sleep({delay})\n{end}"
        assert local.launch([script_job(tmp_path, text)], local.Options(hosts=2)) == code
        assert f"host 1 of {tmp_path}/w ended with exit code {code}" in capsys.readouterr().err

    def test_a_host_that_hangs_is_lost(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(local, "TIME_TO_FAIL", 0.2)
        job = script_job(tmp_path, "if host == '0': sys.exit(75)\ntime.sleep(20)")
        assert local.launch([job], local.Options(hosts=2)) == 75
        # How it was then ended says nothing.
        assert "host 1" not in capsys.readouterr().err

    @pytest.mark.parametrize("end", ["sys.exit(75)", "os.kill(os.getpid(), signal.SIGKILL)"])
    def test_a_run_that_has_lost_a_host_is_started_again(self, tmp_path, end, capsys):
        seen = str(tmp_path / "seen")
        job = script_job(
            tmp_path, f"if os.path.exists({seen!r}): sys.exit(0)\nopen({seen!r}, 'w').close()\n{end}"
        )
        assert local.launch([job], local.Options(restarts=1)) == 0
        assert "has lost a host; it goes on (0 restart(s) left)" in capsys.readouterr().err

    def test_a_signal_while_processes_are_started(self, tmp_path):
        """It comes between the first and the second; both must hear of it."""
        job = script_job(tmp_path, "time.sleep(5)\nprint('still here')")
        commands = []

        class Interrupted(type(job)):
            @property
            def here(self):
                commands.append(super().here)
                if len(commands) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return commands[-1]

        started = Interrupted(job.words, job.workdir, job.name)
        assert local.launch([started], local.Options(hosts=2, restarts=1)) == 143
        assert len(commands) == 2
        assert [Path(job.logs, f"host{host}.log").read_text() for host in (0, 1)] == ["", ""]

    def test_restarts(self, tmp_path, capsys):
        text = "seen = os.path.join({!r}, 'seen')\nopen(seen, 'a').write('x')\nsys.exit(143 if len(open(seen).read()) < 3 else 0)"
        job = script_job(tmp_path, text.format(str(tmp_path)))
        assert local.launch([job], local.Options(restarts=1)) == 143
        assert local.launch([job], local.Options(restarts=1)) == 0
        assert "it goes on (0 restart(s) left)" in capsys.readouterr().err

    @pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
    def test_signals_are_passed_on_once(self, tmp_path, number, code, capsys):
        """SIGUSR1 lets the run go on, in a restart; SIGTERM is for the launcher too."""
        text = f"""
got = []
signal.signal({int(number)}, lambda *_: got.append(1))
if os.path.exists({str(tmp_path / "again")!r} + host): sys.exit(0)
open({str(tmp_path / "again")!r} + host, "w").close()
while not got: time.sleep(0.01)
time.sleep(0.3)
sys.exit(143 if len(got) == 1 else 9)
"""
        job = script_job(tmp_path, text)

        def send():
            until(lambda: all((tmp_path / f"again{host}").exists() for host in (0, 1)))
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=send)
        thread.start()
        assert local.launch([job], local.Options(hosts=2, restarts=1)) == code
        thread.join()

    def test_a_failed_run_of_a_sweep_does_not_stop_the_others(self, tmp_path, capsys):
        jobs = [script_job(tmp_path, f"sys.exit({code})", name) for name, code in (("a", 3), ("b", 0))]
        assert local.launch(jobs, local.Options(jobs=2)) == 3
        assert "ends with 3" in capsys.readouterr().err and Path(jobs[1].logs, "host0.log").exists()

    def test_dry_run(self, capsys):
        assert local.launch([JOB], local.Options(hosts=2, devices_per_host=4), dry_run=True) == 0
        lines = capsys.readouterr().out.splitlines()
        words = [shlex.split(line) for line in lines]
        # They are to meet in one place.
        assert words[0][1] == words[1][1] and words[0][1].startswith("BVL_COORDINATOR=")
        assert "BVL_PROCESS_ID=1" in words[1] and "JAX_NUM_CPU_DEVICES=4" in words[1]
        assert words[1][-2:] == [">>runs/a/logs/host1.log", "2>&1"]

    def test_processes_find_each_other(self, tmp_path):
        """What they then do is tested in test_hosts.py."""
        text = """
import jax
from bvl import hosts
hosts.initialise()
print(hosts.describe(), jax.device_count(), hosts.gather(host))
"""
        job = script_job(tmp_path, text)
        assert local.launch([job], local.Options(hosts=2, devices_per_host=3)) == 0
        for host in (0, 1):
            said = Path(job.logs, f"host{host}.log").read_text()
            assert f"host {host} of 2" in said and "6 ['0', '1']" in said
