"""Settings of a cluster profile (`configs/cluster/*.yaml`): where jobs run and what they ask for."""

from __future__ import annotations

import re
import typing as t

from bushpc.config.fields import Options, Settings, config_class, group, setting
from bushpc.errors import ConfigError

# Of a GPU as sites name it: a100, nvidia_a100-sxm4-80gb, a100_1g.5gb.
GPUS = re.compile(r"(?:([A-Za-z][\w.+-]*):)?(\d+)")
GRES = re.compile(r"([A-Za-z][\w/-]*)(:[\w.+-]+)*")


@config_class
class CpuJobsConfig(Settings):
    """What differs for jobs without a GPU. null: as for the cells; '' (empty): the cluster's default."""

    prefix: t.ClassVar[str] = "cluster.cpu_jobs."

    partition: str | None = setting(None, "Partition of jobs without a GPU.", affects="nothing", since=2)
    account: str | None = setting(None, "Account of jobs without a GPU.", affects="nothing", since=2)
    qos: str | None = setting(None, "Quality of service of jobs without a GPU.", affects="nothing", since=2)
    constraint: str | None = setting(None, "Node features for jobs without a GPU.", affects="nothing", since=2)
    mem_gb: int | None = setting(
        None, "Memory of a job without a GPU; 0 asks for none.", unit="GB", affects="nothing", ge=0, since=2
    )
    sbatch: Options = setting(
        Options(), "As cluster.sbatch, in addition to it; null removes an option.", affects="nothing", since=2
    )


@config_class
class ContainerConfig(Settings):
    """The container in which the ranks of a job run. The batch shell stays outside."""

    prefix: t.ClassVar[str] = "cluster.container."

    image: str | None = setting(None, "Image file or name; null for no container.", affects="nothing", since=2)
    runtime: t.Literal["apptainer", "singularity", "pyxis", "enroot", "custom"] = setting(
        "apptainer", "What starts the container; custom uses `command`.", affects="nothing", since=2
    )
    command: str | None = setting(
        None,
        "With runtime=custom: the words before `python`; {image} stands for the image, {binds} for what has to be "
        "mounted, as from:to with commas between.",
        affects="nothing",
        since=2,
    )
    python: str = setting("python", "Python inside the image.", affects="nothing", since=2)
    binds: tuple[str, ...] = setting(
        (),
        "Folders to mount, as from:to, from:to:ro or one path for both sides; those of the run are added.",
        affects="nothing",
        since=2,
    )

    def __post_init__(self) -> None:
        if (self.runtime == "custom") != (self.command is not None):
            raise ConfigError(
                f"cluster.container.runtime={self.runtime} with cluster.container.command={self.command or 'null'}: "
                "runtime=custom needs a command, and the others take none"
            )

    @property
    def used(self) -> bool:
        """Whether the profile asks for a container."""
        return self.image is not None or self.command is not None


@config_class
class ClusterConfig(Settings):
    """Where and with what resources jobs run; results do not depend on it."""

    prefix: t.ClassVar[str] = "cluster."

    executor: str = setting("local", "What runs the jobs: local (this machine) or slurm.", affects="nothing")
    nodes: int = setting(1, "Nodes per cell.", affects="nothing", ge=1)
    ranks_per_node: int = setting(1, "Ranks per node; each rank is one task.", affects="nothing", ge=1)
    gpus: int | str | None = setting(
        0,
        "GPUs per node: a number, or type and number (a100:4) where the site wants the type; 0 trains on the CPU.",
        affects="nothing",
    )
    gpus_by: t.Literal["gpus_per_node", "gres", "gpus", "none"] = setting(
        "gpus_per_node",
        "How Slurm is asked for GPUs: --gpus-per-node, --gres=gpu:…, --gpus (all nodes together), or none where the "
        "queue implies them.",
        affects="nothing",
        since=2,
    )
    cpus_per_rank: int = setting(1, "CPU cores per rank.", affects="nothing", ge=1)
    parallel: int = setting(
        0,
        "Jobs of an array that run at the same time; 0 derives it from the machine (local) or leaves it to Slurm.",
        affects="nothing",
        ge=0,
    )
    cells_per_job: int = setting(
        1,
        "Number of one-rank cells that share a job with its memory; each has cpus_per_rank cores to itself. With as "
        "many GPUs as cells each has its own, else they share them evenly.",
        affects="nothing",
        ge=1,
    )
    submit_window: int | None = setting(
        None,
        "Jobs of a run that are in the queue at the same time at most; null reads the site's limits.",
        affects="nothing",
        ge=1,
        since=2,
    )
    time_min: int = setting(1440, "Time limit of a job.", unit="minutes", affects="nothing", ge=1)
    stop_lead_s: int = setting(
        120,
        "How long before the time limit a job is told to save and requeue: at most half of the limit, and up to a "
        "minute earlier, because Slurm checks once a minute. Slurm only.",
        unit="s",
        affects="nothing",
        ge=1,
    )
    grace_s: float | None = setting(
        None,
        "Time from a stop signal to KILL (Slurm: the partition's GraceTime or KillWait); null if unknown. `bushpc "
        "doctor --slurm` measures it. If stops may take longer, that is reported and saves come more often.",
        unit="s",
        affects="nothing",
        gt=0,
    )
    report: t.Literal["job", "login", "last_cell"] = setting(
        "job",
        "What writes the report: `job`, a job after the cells; `last_cell`, the job whose cell ends last, for sites "
        "without room for a job without a GPU (locally as `job`); or `login`, the command that submits, with --wait or "
        "when it is given again after the cells: without either nothing waits, and `bushpc report RUN` writes it.",
        affects="nothing",
        since=2,
    )
    report_time_min: int = setting(
        60,
        "Time limit of the report job; locally this includes waiting for the cells.",
        unit="minutes",
        affects="nothing",
        ge=1,
    )
    mem_gb: int | None = setting(
        None,
        "Memory; 0 asks for all of the node, null uses the cluster's default. Slurm only.",
        unit="GB",
        affects="nothing",
        ge=0,
    )
    mem_per: t.Literal["node", "gpu", "cpu"] = setting("node", "What mem_gb counts for.", affects="nothing", since=2)
    exclusive: bool = setting(False, "Whole nodes, which no other job shares. Slurm only.", affects="nothing", since=2)
    gres: tuple[str, ...] = setting(
        (), "Further generic resources per node, such as [nvme:100]; GPUs are `gpus`.", affects="nothing", since=2
    )
    partition: str | None = setting(None, "Slurm partition; null uses the cluster's default.", affects="nothing")
    account: str | None = setting(None, "Slurm account; null uses the cluster's default.", affects="nothing")
    qos: str | None = setting(None, "Slurm quality of service; null uses the cluster's default.", affects="nothing")
    constraint: str | None = setting(None, "Slurm node features that a job requires; null for none.", affects="nothing")
    sbatch: Options = setting(
        Options(),
        "Any other option of sbatch by its long name, e.g. {hint: nomultithread}; true gives it without a value, null "
        "removes it.",
        affects="nothing",
        since=2,
    )
    srun: Options = setting(
        Options(), "Any other option of the srun that starts the ranks, as in sbatch.", affects="nothing", since=2
    )
    setup: tuple[str, ...] = setting(
        (),
        "Shell lines (bash) to run before the ranks start, on any executor, e.g. `module load cuda`. The first one "
        "that fails ends the job.",
        affects="nothing",
    )
    staging: str | None = setting(
        None,
        "Folder on the node's own disk to which a job copies its data, e.g. $SLURM_TMPDIR; auto looks for one; null "
        "copies nothing.",
        affects="nothing",
        since=2,
    )
    container: ContainerConfig = group(ContainerConfig, "The container in which ranks run.", affects="nothing")
    cpu_jobs: CpuJobsConfig = group(CpuJobsConfig, "What differs for jobs without a GPU.", affects="nothing")

    def __post_init__(self) -> None:
        if not GPUS.fullmatch(str(self.gpus or 0)):
            raise ConfigError(
                f"cluster.gpus={self.gpus}: write a number, or type and number; for example cluster.gpus=4 or "
                "cluster.gpus=a100:4"
            )
        if self.cells_per_job > 1 and self.world_size > 1:
            raise ConfigError(
                f"cluster.cells_per_job={self.cells_per_job} with {self.world_size} ranks per cell: only cells of one "
                "rank share a job; set cluster.nodes=1 and cluster.ranks_per_node=1, or cluster.cells_per_job=1"
            )
        count, ranks, cells = self.gpu_count, self.ranks_per_node, self.cells_per_job
        if count and (cells % count if ranks == 1 else count != ranks):
            raise ConfigError(
                f"cluster.gpus={self.gpus} with cluster.ranks_per_node={ranks} and cluster.cells_per_job={cells}: "
                f"each rank drives one GPU. Set cluster.ranks_per_node={count}, or cluster.cells_per_job={count} for "
                f"{count} cells of one rank"
            )
        self._check_memory_and_gres()

    def _check_memory_and_gres(self) -> None:
        if self.mem_gb == 0 and self.mem_per != "node":
            raise ConfigError(
                f"cluster.mem_gb=0 with cluster.mem_per={self.mem_per}: 0 means all memory of the node; set "
                "cluster.mem_per=node, or an amount"
            )
        if self.mem_gb and self.mem_per == "gpu" and not self.gpu_count:
            raise ConfigError(f"cluster.mem_per=gpu with cluster.gpus={self.gpus or 0}: set cluster.mem_per=node")
        for item in self.gres:
            if not GRES.fullmatch(item):
                raise ConfigError(f"cluster.gres=[{item}]: write name:count or name:type:count; for example [nvme:100]")
            if item.partition(":")[0] == "gpu":
                instead = item.partition(":")[2] or "1"
                raise ConfigError(
                    f"cluster.gres=[{item}] with cluster.gpus={self.gpus or 0}: GPUs are asked for once; set "
                    f"cluster.gpus={instead} cluster.gpus_by=gres and leave {item} out of cluster.gres"
                )

    @property
    def gpu_count(self) -> int:
        """GPUs per node."""
        match = GPUS.fullmatch(str(self.gpus or 0))
        assert match is not None, "checked"
        return int(match[2])

    @property
    def gpu_type(self) -> str | None:
        """The type of GPU that the profile names."""
        match = GPUS.fullmatch(str(self.gpus or 0))
        assert match is not None, "checked"
        return match[1]

    @property
    def world_size(self) -> int:
        """Ranks of one cell."""
        return self.nodes * self.ranks_per_node
