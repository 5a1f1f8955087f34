"""The processes: one DeepSpeed engine over all ranks, set up through Accelerate; votes, gathers, fp32 masters."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.cli import ConfigError
from data.files import UserError
from train.config import LimitsConfig, TrainConfig
from train.resharding import local_slices

BUCKET = 2 * 10**8  # elements


def prepare_environment(cpu: bool) -> None:
    """What DeepSpeed and Accelerate read from the environment.  Call before importing either."""
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if os.access(sys.prefix, os.W_OK):  # each environment's own: two that share one build in turns
            os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
        # DeepSpeed compiles its CPU communication op at first use; without these it dies in a long traceback.
        os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
        for program, remedy in (
            ("ninja", "pip install ninja"),
            ("g++", "install a C++ compiler, such as Debian's g++"),
        ):
            if shutil.which(program) is None:
                raise UserError(f"DeepSpeed on the CPU needs {program} on the PATH; {remedy}")
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        if not headers.is_file():
            raise UserError(
                f"DeepSpeed on the CPU needs Python's headers, and {headers} is not there; apt-get install python3-dev"
            )
    if "RANK" not in os.environ:  # started as plain `python train/stage1.py`: a world of one
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bfloat16 dot products (AVX512-BF16 or AMX): there bf16 is several times faster than fp32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(precision: str, cpu: bool = False) -> str:
    if precision != "auto":
        return precision
    if not cpu and torch.cuda.is_available():  # in this order: asking CUDA makes CUDA_VISIBLE_DEVICES final
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def deepspeed_config(config: TrainConfig, precision: str, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, made from ours and nowhere else.  parameters: that are trained."""
    zero: dict[str, Any] = {"stage": config.deepspeed.zero_stage, "overlap_comm": torch.cuda.is_available()}
    if config.deepspeed.zero_stage >= 1:
        zero["contiguous_gradients"] = True
        # Buffers of so many elements; DeepSpeed's own 5e8 take a gigabyte of a GPU each, however small the network.
        zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = min(BUCKET, parameters)
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        # DeepSpeed's own for stage 0 in fp32 stumbles over a step that is left out; see `take_step`.
        "gradient_clipping": 0.0 if clips_itself(config.deepspeed.zero_stage, precision) else config.optim.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},  # the loss's scale is found as it goes
        "steps_per_print": 10**9,  # our own log says it
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every step
        "zero_allow_untested_optimizer": True,
    }


def patience(limits: LimitsConfig) -> timedelta:
    """How long a collective waits: longer than any limit of ours, so that the watchdog is there first, with names."""
    seconds = (limits.set_up_s, limits.step_s, limits.checkpoint_s)
    return timedelta(seconds=max(seconds) + 300) if min(seconds) > 0 else timedelta(days=30)


def build_engine(config: TrainConfig, unet: nn.Module) -> tuple[Any, Any]:
    """Accelerator and DeepSpeed engine around the UNet.  AdamW over those of its parameters that require gradients."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType, InitProcessGroupKwargs
    from deepspeed.accelerator import get_accelerator

    from train.checkpoint_files import CheckpointFiles  # imports DeepSpeed, which reads the environment

    precision = resolve_precision(config.precision)
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("precision=fp16: DeepSpeed has no fp16 on this device; take bf16 or fp32")
    ours = deepspeed_config(config, precision, sum(p.numel() for p in unet.parameters() if p.requires_grad))
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ours),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="nccl" if torch.cuda.is_available() else "gloo", timeout=patience(config.limits)
            )
        ],
    )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise UserError(
            f"Accelerate chose {accelerator.distributed_type} and not DeepSpeed; start with `accelerate launch "
            "--use_deepspeed` and without an accelerate configuration file that asks for another engine"
        )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in unet.parameters() if parameter.requires_grad],
        lr=config.optim.lr,
        betas=(config.optim.betas[0], config.optim.betas[1]),
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        fused=not config.deepspeed.offload_optimizer,
    )
    starts = [p.detach() for p in unet.parameters()] if precision != "fp32" else []  # they keep what is cast now
    engine, _ = accelerator.prepare(unet, optimizer)
    if starts:
        set_masters(engine, starts)
        forget_steps(engine)
    engine.checkpoint_engine = CheckpointFiles()
    if engine.zero_optimization_stage() == 0 and engine.world_size == 1:
        engine.enable_backward_allreduce = False  # it copies all gradients there and back, with nobody to add
    engine._copy_recovery_script = lambda _: None  # a script beside the files, which could fail on one rank alone
    running = engine.zero_optimization_stage()
    if config.compile is not None:
        engine.module.compile(backend=config.compile)  # in place, so that no name of a weight changes
    if running != config.deepspeed.zero_stage:
        raise ConfigError(f"deepspeed.zero_stage={config.deepspeed.zero_stage}, but the engine runs stage {running}")
    return accelerator, engine


@torch.no_grad()
def set_masters(engine: Any, weights: list[Tensor]) -> None:
    """Puts rank 0's whole fp32 weights, in the parameters' order, into the masters; DeepSpeed takes 16-bit ones."""
    for parameter, weight, master, place in zip(
        engine.module.parameters(), weights, local_masters(engine), local_slices(engine), strict=True
    ):
        if not parameter.requires_grad:
            continue
        shared = weight.to(engine.device, copy=True).contiguous()
        dist.broadcast(shared, src=0)
        if master is not None and place is not None:
            piece = shared.flatten()[place[0] : place[0] + place[1]]  # ZeRO-3 pads the last rank's
            master.flatten()[: len(piece)].copy_(piece)


def forget_steps(engine: Any) -> None:
    """Adam begins to count at its first step; DeepSpeed makes room for its moments by one without gradients."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0


def all_agree(ok: bool, device: torch.device) -> bool:
    """True only if every rank says so."""
    vote = torch.tensor([1 if ok else 0], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote.item())


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Of each flag, whether one rank has it set.  Collective."""
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def clips_itself(zero_stage: int, precision: str) -> bool:
    return zero_stage == 0 and precision == "fp32"


def take_step(engine: Any, clip_norm: float) -> bool:
    """Counts a micro-batch; after the last one updates the weights.  False when the update was left out.

    That is so on all ranks when a gradient of one is not finite, since gradients are summed over ranks first; weights
    and optimizer state stay as they are.  DeepSpeed sees to it but for stage 0 in fp32.
    """
    last = engine.is_gradient_accumulation_boundary()
    if last and not hasattr(engine.optimizer, "overflow"):
        norm = float(nn.utils.clip_grad_norm_(engine.module.parameters(), clip_norm))
        engine._global_grad_norm = norm  # what get_global_grad_norm says
        if not math.isfinite(norm):
            engine.module.zero_grad(set_to_none=True)
            engine.step()  # has nothing to do but to count
            return False
    try:
        engine.step()
    except Exception as error:  # DeepSpeed's own is of no narrower kind
        if "loss scale already at minimum" not in str(error):
            raise
        raise OnEveryRank(
            "precision=fp16: gradients are not finite at the smallest scale; lower optim.lr, or begin anew with "
            "precision=bf16 or fp32"
        ) from None
    return not last or engine.was_step_applied()


class OnEveryRank(UserError):
    """Raised by all ranks at the same point: a collective may still follow."""


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


@contextlib.contextmanager
def memory_explained(config: TrainConfig) -> Iterator[None]:
    """UserError that says what to change when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = str(error) or "no main memory left"
        if not isinstance(error, MemoryError) and not any(sign in words.lower() for sign in OUT_OF_MEMORY):
            raise
        smaller = [n for n in range(1, config.micro_batch_size) if config.micro_batch_size % n == 0]
        ways = [
            f"micro_batch_size={smaller[-1]}" if smaller else "",
            "" if config.gradient_checkpointing else "gradient_checkpointing=true",
        ]
        anew = [
            "deepspeed=zero3" if config.deepspeed.zero_stage < 3 else "",
            "" if config.deepspeed.offload_optimizer else "deepspeed.offload_optimizer=true",
            "trainable=lora" if config.trainable == "all" else "",
        ]
        raise UserError(
            f"out of memory ({words.splitlines()[0][:300]}); try, in this order: "
            f"{', '.join(filter(None, ways)) or 'a device with more'}; or, for a run that begins anew with another "
            f"name=, {', '.join(filter(None, anew)) or 'a smaller model'}; dry_run=true says what a run needs"
        ) from None


def local_masters(engine: Any) -> list[Tensor | None]:
    """This rank's part of each parameter's fp32 master, in the parameters' order; None where it holds none.

    Frozen parameters have none.  Views into the optimizer's own memory, on its device: the CPU where the optimizer is
    offloaded.  They stay valid until a checkpoint is loaded.
    """
    # ZeRO-0 in bf16 has its own, beside the parameters, in the same groups.
    own: dict[int, Tensor] = {}
    if hasattr(engine.optimizer, "fp32_groups"):
        for ours, theirs in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            own |= {id(parameter): master for parameter, master in zip(ours, theirs, strict=True)}
    masters: list[Tensor | None] = []
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            masters.append(None)
        elif id(parameter) in own:
            masters.append(own[id(parameter)])
        elif hasattr(parameter, "ds_id"):  # ZeRO-3
            group, start, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
            masters.append(engine.optimizer.fp32_partitioned_groups_flat[group].narrow(0, start, length))
        elif getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO-1 and 2
            masters.append(parameter._hp_mapping.get_hp_fragment())
        elif hasattr(engine.optimizer, "bf16_groups") or engine.zero_optimization_stage() > 0:
            masters.append(None)
        else:
            masters.append(parameter.data)
    return masters


class WeightAverage:
    """Running mean of the fp32 masters, kept where the masters are: sharded like them, no communication.

    The decay grows as (1 + n) / (10 + n) up to its bound, so that short runs are averaged too.
    """

    def __init__(self, engine: Any, decay: float):
        self.engine, self.decay, self.updates = engine, decay, 0
        self.average = [None if m is None else m.detach().clone() for m in local_masters(engine)]
        self.pairs: list[tuple[Tensor, Tensor]] = []  # average and master, found at the first update

    @torch.no_grad()
    def update(self) -> None:
        if not self.pairs:
            masters = local_masters(self.engine)
            self.pairs = [(a, m.detach()) for a, m in zip(self.average, masters, strict=True)
                          if a is not None and m is not None]  # fmt: skip
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_([a for a, _ in self.pairs], [m for _, m in self.pairs], weight)

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor] | None:
        """The averaged trained weights, whole, in fp32 on the CPU of rank 0; None elsewhere.  Every rank must call it.

        Of one parameter at a time the average stands in for the master while DeepSpeed assembles it, and the master
        comes back: no second copy of all weights is held on the device.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = {}
        for (name, parameter), master, average in zip(
            self.engine.module.named_parameters(), local_masters(self.engine), self.average, strict=True
        ):
            if not parameter.requires_grad:
                continue
            kept = None
            if master is not None and average is not None:
                kept = master.detach().clone()
                master.data.copy_(average)
            whole = safe_get_full_fp32_param(parameter)
            if whole is None:  # ZeRO-0: every rank has all of it
                assert master is not None
                whole = master.data
            if self.engine.global_rank == 0:
                gathered[name] = whole.detach().float().to("cpu", copy=True)
            if kept is not None:
                assert master is not None
                master.data.copy_(kept)
        return gathered if self.engine.global_rank == 0 else None
