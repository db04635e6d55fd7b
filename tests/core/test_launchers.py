"""A launcher's variables: mpirun's are read as torchrun's, and what would train alone without a word is refused."""

from __future__ import annotations

import pytest

from sparsetrain.core.launchers import as_torchrun_says

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_mpiruns_ranks() -> None:
    found = OPEN_MPI | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    as_torchrun_says(found)
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert wanted.items() <= found.items() and (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "1234")
    found = dict(HYDRA)
    as_torchrun_says(found)  # on one machine, which is its own head
    assert found["RANK"] == found["LOCAL_RANK"] == "1" and found["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match="4 ranks that do not know where the first one is"):
        as_torchrun_says(dict(OPEN_MPI))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "2", **OPEN_MPI},  # torchrun under srun or mpirun: its own count
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"ACCELERATE_USE_CPU": "True"},
        {"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_what_is_left_as_it_is(environment: dict[str, str]) -> None:
    found = dict(environment)
    as_torchrun_says(found)
    assert found == environment


def test_several_processes_on_a_cpu_that_accelerate_does_not_start() -> None:
    with pytest.raises(ValueError, match=r"--multi_gpu --num_processes N .* --device cpu"):
        as_torchrun_says({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
