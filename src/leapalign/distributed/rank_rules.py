"""Numbers of ranks that a run's batch, draws and sharding allow."""

from __future__ import annotations

from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.run import Run, nearest, nearest_multiples


def check_geometry(run: Run, world: World) -> None:
    """Raise UserError, with the nearest valid sizes, unless the batch is whole rounds of micro_batch_size x ranks."""
    batch, micro, ranks = run.batch_size, run.micro_batch_size, world.size
    if batch % (micro * ranks):
        ways = [f"batch_size {nearest_multiples(batch, micro * ranks)}"]
        if batch % ranks == 0:
            ways.append(
                f"micro_batch_size {nearest([m for m in range(1, batch + 1) if batch // ranks % m == 0], micro)}"
            )
        ways.append(f"{nearest([n for n in range(1, batch + 1) if batch // micro % n == 0], ranks)} ranks")
        raise UserError(
            f"batch_size {batch} cannot be divided into rounds of {ranks} ranks with micro-batches of {micro}; "
            f"use {', or '.join(ways)}"
        )
    if run.sharding in ("full", "hybrid") and (why := unequal_forwards(run, world)):
        unit = micro * ranks
        raise UserError(
            f"sharding {run.sharding}: {why}; use samples_per_draw {nearest_multiples(run.samples_per_draw, unit)}, 0 "
            "for the whole batch, or sharding replicate"
        )
    if run.shard_ranks and ranks > 1 and (run.shard_ranks > ranks or ranks % run.shard_ranks):
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise UserError(
            f"shard_ranks {run.shard_ranks} does not divide {ranks} ranks; use {nearest(fits, run.shard_ranks)}"
        )


def unequal_forwards(run: Run, world: World) -> str:
    """Explain why ranks would run different numbers of forwards or backwards in a round; empty if they would not.

    Ranks with sharded weights gather each block together, so all must run it equally often.
    """
    unit = run.micro_batch_size * world.size
    if run.samples_per_draw % unit == 0:
        return ""
    causes = {
        f"the forwards of {run.method.name} depend on the draw": not run.method.same_forwards,
        f"the forwards of {run.model.name} depend on the step": not run.model.same_forwards,
        "gather_in_rollout gathers by the draw": run.gather_in_rollout,
    }
    why = " and ".join(cause for cause, applies in causes.items() if applies)
    return why and (
        f"{why}, and samples_per_draw {run.samples_per_draw} is not a multiple of the {unit} samples that "
        f"{world.size} ranks work on at a time"
    )
