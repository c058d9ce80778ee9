"""Files and page for clusters: what they start is understood by the commands themselves."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
import yaml

from iwm.ablation.studies import AblateOptions
from iwm.train_options import parse

ROOT = Path(__file__).parents[1]
BATCH_FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
PAGES = [ROOT / "docs" / "clusters.md", ROOT / "slurm" / "README.md", *BATCH_FILES]


def trained(line: str) -> list[str]:
    """Return the arguments of `iwm train` in a line of shell; of a batch file too, whose words it gets."""
    _, _, words = re.sub(r"\\\n", " ", line).partition(".sbatch ")
    return shlex.split(words) if words else shlex.split(re.split(r"iwm\.train|iwm/train\.py|iwm train", line)[1])


def training_lines() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        code = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)) if page.suffix == ".md" else text
        lines = [line.lstrip("# ") for line in code.splitlines()]
        found += [x for x in lines if re.search(r"^sbatch|iwm\.train |iwm/train\.py", x) and "study" not in x]
    return found


def test_the_page_and_the_files_have_commands() -> None:
    assert len(training_lines()) >= 10
    assert len(BATCH_FILES) == 4


@pytest.mark.parametrize("line", training_lines())
def test_a_training_command_is_understood(line: str) -> None:
    words = [word for word in trained(line) if word not in ("$@", "&")]
    recipe = [] if words and not words[0].startswith("-") else ["demo"]
    parse([*recipe, *words])


def test_the_studys_command_is_understood() -> None:
    text = (ROOT / "slurm" / "study.sbatch").read_text()
    line = next(line for line in text.splitlines() if line.startswith("python -m iwm ablate"))
    words = shlex.split(line.partition("ablate")[2].replace("&", ""))
    values = {"$study": "conditioning", "$recipe": "demo", "$SLURM_ARRAY_TASK_ID": "3", "$@": ""}
    filled = [values.get(word, re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word)) for word in words]
    options = tyro.cli(AblateOptions, args=[word for word in filled if word])
    assert (options.study, options.only, options.processes) == ("conditioning", 3, 1)


@pytest.mark.parametrize("file", BATCH_FILES, ids=lambda file: file.name)
def test_a_batch_file_is_valid_bash_and_is_listed(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    assert f"[{file.name}]({file.name})" in (ROOT / "slurm" / "README.md").read_text()


def test_the_kubernetes_manifest_trains_on_every_replica() -> None:
    job = yaml.safe_load((ROOT / "docs" / "clusters" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator looks for this name"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        assert container["args"][:2] == ["-m", "iwm.train"]
        command = parse(container["args"][2:])
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert all(
            any(str(path).startswith(f"{at}/") for at in mounted)
            for path in (command.run_dir, command.config.data.shards)
        )
        grace = int(next(x["value"] for x in container["env"] if x["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"))
        assert grace < replica["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_skypilot_task_trains_on_what_it_mounts() -> None:
    task = yaml.safe_load((ROOT / "docs" / "clusters" / "skypilot.yaml").read_text())
    assert {"resources", "num_nodes", "file_mounts", "setup", "run"} <= task.keys()
    command = parse(trained(task["run"].replace("\\\n", " ")))
    mounts = [Path(mount) for mount in task["file_mounts"]]
    assert Path(command.config.data.shards) in mounts
    assert command.run_dir.parent in mounts
