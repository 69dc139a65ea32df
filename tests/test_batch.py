"""`spatialid batch`: workers and schedulers that are killed, notebooks that fail, a full disk, two batches at once.

Nothing is lost, nothing done twice without need, and the numbers are those of a serial run."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatialid import cli, runner
from spatialid.cluster import Pool, jobs_of, local_workers

RAN = """import os
with open('ran', 'a') as f: print('{stem}', model, os.getppid(), file=f)
"""
SAVE = """from spatialid.store import load_results, save_results
before = load_results(model, '{need}')['x'] if '{need}' else len(model)
save_results(model, '{stem}', {{'x': 10 * before + n}}, {{}})
"""
ONCE = "assert model != 'llava-tiny' or open('ran').read().count('{stem} llava-tiny') > 1, 'the first time'\n"
FULL = """if model == 'gemma3-tiny' and os.path.exists('full'):
    def refuse(*_): raise OSError(28, 'No space left on device')
    os.replace = refuse
"""
WAIT = "import time\nwhile not os.path.exists('{stem}.go'): time.sleep(.1)\n"


def add(lab, stem, need="", extra=""):
    "A notebook that notes that it ran, and saves a number made from that of the notebook it needs."
    code = (RAN + extra + SAVE).format(stem=stem, need=need)
    lab.notebook(stem, code, parameters='model = "llava-tiny"\nn = 3', needs=[need] if need else [])


def runs(lab):
    "[(notebook, model), …] as they began, and the processes that ran them."
    path = lab.root/"nbs"/"ran"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [tuple(row[:2]) for row in rows], [int(row[2]) for row in rows]


def numbers(root):
    return {str(path.relative_to(root)): path.read_text() for path in Path(root).glob("results/*/[0-9]*.json")}


def serial(lab, monkeypatch, models, stems):
    "The numbers of a run of one notebook after another in this process."
    monkeypatch.setenv("SPATIALID_RESULTS", str(lab.root/"serial"))
    for model in models:
        for stem in stems: runner.run_notebook(runner.find_notebook(stem), model)
    return numbers(lab.root/"serial")


@pytest.mark.slow
def test_failures_and_a_full_disk(lab, capfd, monkeypatch):
    "What fails is begun again; what needs it is left out; the same command does what is missing, and nothing else."
    models = ["llava-tiny", "gemma3-tiny"]
    add(lab, "03_extraction", extra=ONCE)
    add(lab, "04_steering", "03_extraction", FULL)
    lab.notebook("13_models", "print('compared')\nopen('ran', 'a').write('13_models all 0\\n')", parameters="seed = 0")
    (lab.root/"nbs"/"full").touch()
    batch = "batch", ",".join(models), "--notebooks", "13,04", "--workers", "2", "--full"
    assert cli.main(batch) == 1
    said = capfd.readouterr()
    assert "Dask's page: http://" in said.out and "04_steering · llava-tiny: done in" in said.out
    assert "No space left on device. Make the folder writable" in said.err and "Traceback" not in said.err
    assert "13_models: not run, it needs 04_steering · gemma3-tiny\n" in said.err
    assert "Failed: 04_steering · gemma3-tiny, 13_models" in said.err
    began, _ = runs(lab)
    one, other = ("03_extraction", "llava-tiny"), ("04_steering", "gemma3-tiny")
    assert sorted(began) == [("03_extraction", "gemma3-tiny"), one, one, other, other, ("04_steering", "llava-tiny")]
    (lab.root/"nbs"/"full").unlink()
    assert cli.main(batch) == 0 and capfd.readouterr().out.count("already done") == 3
    assert runs(lab)[0][len(began):] == [other, ("13_models", "all")]
    log = (lab.root/"results"/".runs"/"13_models.log").read_text()
    assert socket.gethostname() in log and log.endswith("compared\n")
    found = numbers(lab.root)
    assert len(found) == 4 and found == serial(lab, monkeypatch, models, ("03", "04"))


def dask(*args):
    "A process of Dask."
    command = [sys.executable, "-m", "dask", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Cluster:
    "A scheduler and two workers, processes of their own, whose files are in a folder of theirs."
    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.processes = f"tcp://127.0.0.1:{self.port}", []

    def start(self):
        self.scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", self.port, "--no-dashboard")
        self.processes += [self.scheduler, *(self.worker() for _ in range(2))]

    def worker(self):
        files = "--local-directory", self.folder
        return dask("worker", self.address, "--nthreads", 1, "--no-nanny", "--no-dashboard", *files)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    cluster.start()
    yield cluster
    cluster.stop()


def until(true, *processes):
    "Wait until something is so; fail if a process has ended before, or after five minutes."
    deadline = time.time() + 300
    while not true():
        ended = [process.communicate() for process in processes if process.poll() is not None]
        assert not ended and time.time() < deadline, ended
        time.sleep(.1)


@pytest.mark.slow
def test_killed_workers_and_schedulers(lab, cluster, monkeypatch):
    "Two batches at once on one folder; one of two workers is killed, then the scheduler, each during a notebook."
    stems = ["01_a", "03_extraction", "04_steering"]
    add(lab, "01_a")
    add(lab, "03_extraction", extra=WAIT)
    add(lab, "04_steering", "03_extraction", WAIT)
    def start(): return lab.start("batch", "llava-tiny", "--scheduler", cluster.address, "--full")
    def began(stem): return runs(lab)[0].count((stem, "llava-tiny"))
    batches = [start(), start()]
    until(lambda: began("03_extraction"), *batches)
    os.kill(runs(lab)[1][-1], signal.SIGKILL)
    until(lambda: began("03_extraction") == 2, *batches)
    (lab.root/"nbs"/"03_extraction.go").touch()
    until(lambda: began("04_steering"), *batches)
    cluster.scheduler.kill()
    for batch in batches:
        _, err = batch.communicate(timeout=300)
        assert batch.returncode == 1 and "the scheduler is gone" in err and "Traceback" not in err, err
    cluster.stop()
    cluster.start()
    (lab.root/"nbs"/"04_steering.go").touch()
    last = start()
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0 and out.count("already done") >= 2, out + err
    assert [began(stem) for stem in stems[:2]] == [1, 2] and began("04_steering") <= 2, runs(lab)[0]
    found = numbers(lab.root)
    assert len(found) == 3 and found == serial(lab, monkeypatch, ["llava-tiny"], stems)


def visible(): return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.slow
def test_each_worker_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    pool = Pool(workers=8, gpu=True)
    with local_workers(pool) as client:
        seen = [client.submit(visible, pure=False, workers=[worker], resources=pool.resources()).result()
                for worker in client.nthreads()]
    assert sorted(seen) == ["3", "5"]


def test_a_script_for_slurm():
    "The options of the batch system are passed on; a job runs one notebook at a time, with all its cores."
    options = {"cores": 8, "memory": "64 GB", "queue": "gpu", "walltime": "04:00:00",
               "job_extra_directives": ["--gres=gpu:1"], "worker_extra_args": ["--lifetime", "3h"]}
    with jobs_of(Pool("slurm", gpu=True, options=options)) as jobs: lines = jobs.job_script().splitlines()
    for option in ("-p gpu", "--cpus-per-task=8", "--mem=60G", "-t 04:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {option}" in lines, lines
    words = lines[-1].split()
    assert words[words.index("-m") + 1] == "distributed.cli.dask_worker" and "--no-nanny" in words
    assert " ".join(words).endswith("--nthreads 1 --resources GPU=1 --lifetime 3h")


@pytest.mark.parametrize("words, says", [
    (("--scheduler", "slrum"), "give local, slurm, pbs, lsf or an address such as tcp://"),
    (("--notebooks", "12"), "12_bench is no experiment of"),
    (("--notebooks", "99"), "no notebook '99'"),
    (("-o", "queue=gpu"), "-o is for slurm, pbs, lsf"),
    (("--scheduler", "slurm", "-o", "queue"), "write -o name=value"),
    (("--scheduler", "slurm", "-o", "cores=2"), "--scheduler slurm: "),
    (("--scheduler", "lsf", "-o", "no_such=2", "-o", "memory=2GB"), "no_such"),
    (("--scheduler", "tcp://127.0.0.1:9"), "no scheduler answers at tcp://127.0.0.1:9: start one with"),
    (("--workers", "0"), "give at least one of --workers"),
    (("--gpu",), "there is no GPU on this machine"),
])
def test_a_wrong_argument_is_one_sentence(lab, capsys, monkeypatch, words, says):
    monkeypatch.setattr("spatialid.cluster.visible_gpus", list)
    lab.notebook("01_a", parameters='model = "llava-tiny"\nquick = True')
    lab.notebook("12_bench")
    assert cli.main(["batch", "llava-tiny", *words]) in (1, 2)
    err = capsys.readouterr().err.strip()
    assert says in err and "\n" not in err and not (lab.root/"nbs"/"ran").exists()


def test_resuming_a_batch_that_is_done_starts_no_worker(lab, monkeypatch, capsys):
    lab.notebook("01_a", parameters='model = "llava-tiny"')
    monkeypatch.setattr(runner, "is_done", lambda *job: True)
    monkeypatch.setattr("spatialid.cluster.workers_of", None)
    assert cli.main(["batch", "llava-tiny", "--full"]) == 0
    assert "01_a · llava-tiny: already done" in capsys.readouterr().out


def test_ctrl_c_is_left_to_this_process():
    "dask-jobqueue answers it itself when it is imported, and cannot be imported by a thread."
    code = ("import signal\nfrom threading import Thread\nfrom spatialid.cluster import Pool, jobs_of\n"
            "before = signal.getsignal(signal.SIGINT)\n"
            "def jobs():\n    with jobs_of(Pool('slurm', options={'cores': 1, 'memory': '1GB'})): print('made')\n"
            "thread = Thread(target=jobs)\nthread.start()\nthread.join()\n"
            "print(signal.getsignal(signal.SIGINT) is before)")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["made", "True"]
