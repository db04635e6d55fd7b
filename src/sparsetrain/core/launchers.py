"""What a launcher says of a process, in the variables that torchrun sets and everything here reads."""

from __future__ import annotations

from collections.abc import MutableMapping

MPI = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
"""torchrun's variable -> those of MPICH and Intel, Open MPI and MVAPICH; accelerate reads the same ones."""


def as_torchrun_says(environment: MutableMapping[str, str]) -> None:
    """Give the ranks of `mpirun`, by which `accelerate launch --cpu` starts several, torchrun's variables too.

    Raises:
        ValueError: ranks on several machines that are not told where the first one is; or accelerate was asked for
            several processes and has started one, which would train alone without a word.
    """
    if "RANK" in environment:
        return
    told = {name: next((environment[key] for key in keys if key in environment), "") for name, keys in MPI.items()}
    if told["WORLD_SIZE"] in ("", "0", "1"):
        if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_ADDR" in environment:
            raise ValueError(
                "accelerate launch --cpu was asked for several processes, and starts one where it is given no "
                "--mpirun_hostfile. Give `accelerate launch --multi_gpu --num_processes N -m sparsetrain ... --device "
                "cpu`, which starts N on this machine's CPU, or torchrun."
            )
        return
    if "MASTER_ADDR" not in environment and told["LOCAL_WORLD_SIZE"] != told["WORLD_SIZE"]:
        raise ValueError(
            f"mpirun started {told['WORLD_SIZE']} ranks that do not know where the first one is. Give them its "
            "address: mpirun -x MASTER_ADDR=HOST ... (or accelerate launch --main_process_ip HOST)."
        )
    environment.update({name: value for name, value in told.items() if value})
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", "29500")
