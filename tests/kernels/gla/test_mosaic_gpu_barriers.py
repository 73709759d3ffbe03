"""The four warps of a warpgroup wait for each other where they must: read off the jaxprs of the Hopper kernels.

Between warps these kernels place their own barriers, and to the interpreter a warpgroup is one thread. What a product
or TMA reads, or all threads read (scalars, values along rows or columns), must be written before a barrier (for
products and TMA before `commit_smem`), and written again only after one. A thread's own part of a tile needs none.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import source_info_util
from jax.extend.core import Literal, Var, jaxprs_in_params

from kernels.gla import mosaic_gpu
from kernels.gla.mosaic_gpu import backward, finish, forward_tiers
from kernels.gla.mosaic_gpu.ldmatrix import load_tile, store_tile
from kernels.gla.mosaic_gpu.warpgroup import Anything, warps_wait

ROUNDS = 3  # of a loop that are followed: what one round leaves meets the next, and tiles taken in turns come round
ARITHMETIC = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "and": lambda x, y: x & y,
    "rem": lambda x, y: x % y, "div": lambda x, y: x // y, "max": max, "min": min, "or": lambda x, y: x | y,
    "lt": lambda x, y: x < y, "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y,
}  # fmt: skip


class Warps:
    """What warps of one warpgroup have done to shared memory since they last waited for each other.

    `places`: written, not yet committed, read, read by products, sent by TMA.
    """

    def __init__(self, warpgroup, found):
        self.warpgroup, self.found, self.line = warpgroup, found, ""
        self.written, self.uncommitted, self.read, self.read_by_products, self.sent = self.places = [
            [] for _ in range(5)
        ]

    def then(self, branch) -> "Warps":
        """As `branch`, a function of warps, leaves them."""
        after = Warps(self.warpgroup, self.found)
        after.add(self)
        branch(after)
        return after

    def add(self, other):
        for mine, others in zip(self.places, other.places, strict=True):
            mine.extend(place for place in others if place not in mine)

    def need(self, place, *earlier, what):
        for other in (x for places in earlier for x in places):
            if overlap(place, other):
                self.found.append(f"{what}: {place[1]} after {other[1]} {self.line}")

    def barrier(self):
        for places in (self.written, self.read, self.read_by_products):
            places.clear()


def overlap(a, b) -> bool:
    """(allocation, ranges per dimension, or None where unknown)"""
    if a[0] != b[0]:
        return False
    return all(x is None or y is None or (x[0] < y[1] and y[0] < x[1]) for x, y in zip(a[1], b[1], strict=False))


def hazards(jaxpr, warpgroup: int) -> list[str]:
    """What a kernel's first block reads or writes too early, in one of its warpgroups."""
    warps = Warps(warpgroup, [])
    follow(jaxpr, {}, warps)
    return sorted(set(warps.found))


def follow(jaxpr, env, warps):
    """env: of variables, an int that is known, or the allocation that a reference is."""

    def value(x):
        if isinstance(x, Literal):
            return int(x.val) if getattr(x.val, "ndim", 0) == 0 and x.aval.dtype.kind in "iub" else None
        return x if isinstance(x, int) else env.get(x) if isinstance(x, Var) else None

    def enter(inner, outer):
        inside = {}
        for variable, given in zip([*inner.constvars, *inner.invars], outer, strict=True):
            known = value(given)
            if known is None and "Ref" in type(variable.aval).__name__:
                known = ("allocation", id(variable))
            if known is not None:
                inside[variable] = known
        return inside

    def place(variable, tree, leaves):
        return of_transforms(variable, jax.tree.unflatten(tree, leaves) if tree is not None else ())

    def of_transforms(variable, transforms):
        allocation = env.get(variable, ("allocation", id(variable)))
        ranges = []
        for transform in transforms:
            if hasattr(transform, "indices"):
                for index in transform.indices:
                    start, size = (index.start, index.size) if hasattr(index, "start") else (index, 1)
                    start = value(start) if not isinstance(start, int) else start
                    ranges.append(None if start is None or not isinstance(size, int) else (start, start + size))
                break
        return allocation, tuple(ranges)

    def shared_memory(variable):
        return "smem" in str(getattr(variable.aval, "memory_space", "")).lower()

    def write(at, shape):
        warps.need(at, warps.read_by_products, warps.sent, what="written while it is read")
        if len(shape) < 2:
            warps.need(at, warps.read, what="written while it is read")
        if shape:  # (a scalar is written by each thread itself)
            warps.written.append(at), warps.uncommitted.append(at)

    def read(at, shape):
        if len(shape) < 2:
            warps.need(at, warps.written, what="read before it is written")
        warps.read.append(at)

    arrived = None
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        warps.line = source_info_util.summarize(eqn.source_info, 2)
        if name in ARITHMETIC and not eqn.outvars[0].aval.shape:
            known = [value(x) for x in eqn.invars]
            if all(isinstance(x, int) for x in known) and not (name in ("div", "rem") and known[1] == 0):
                env[eqn.outvars[0]] = int(ARITHMETIC[name](*known))
        elif name == "axis_index":
            env[eqn.outvars[0]] = warps.warpgroup if params["axis_name"] == "warpgroup" else 0
        elif name == "convert_element_type" and isinstance(value(eqn.invars[0]), int):
            env[eqn.outvars[0]] = value(eqn.invars[0])
        elif name in ("get", "load", "swap"):
            ref, rest = eqn.invars[0], eqn.invars[2:] if name == "swap" else eqn.invars[1:]
            if not shared_memory(ref):
                if isinstance(value(ref), int):  # what run_state closes over comes in refs
                    env[eqn.outvars[0]] = value(ref)
                continue
            at, shape = place(ref, params["tree"], rest), eqn.outvars[0].aval.shape
            (write if name == "swap" else read)(at, shape)
        elif name == "wgmma_ref":
            trees = [params.get(f"{x}_transforms_tree") for x in ("acc", "a", "b")]
            leaves = list(eqn.invars[3:])
            for variable, tree in zip(eqn.invars[:3], trees, strict=True):
                count = tree.num_leaves if tree is not None else 0
                own, leaves = leaves[:count], leaves[count:]
                if shared_memory(variable):
                    at = place(variable, tree, own)
                    warps.need(at, warps.uncommitted, what="a product reads it before it is committed")
                    warps.read_by_products.append(at)
        elif name in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
            source, target, *leaves = eqn.invars
            of_source, of_target = params["src_transforms_treedef"], params["dst_transforms_treedef"]
            if name == "copy_gmem_to_smem":
                start = 1 + of_source.num_leaves  # after the barrier
                at = place(target, of_target, leaves[start : start + of_target.num_leaves])
                earlier = warps.read_by_products, warps.read, warps.written, warps.sent
                warps.need(at, *earlier, what="fetched over what is in use")
            else:
                at = place(source, of_source, leaves[: of_source.num_leaves])
                warps.need(at, warps.uncommitted, what="sent before it is committed")
                warps.sent.append(at)
        elif name == "commit_smem":
            warps.uncommitted.clear()
            warps.barrier()
        elif name == "inline_mgpu_p":
            fn = params["mgpu_fn"]
            if fn is warps_wait:  # `settle`
                warps.barrier()
            elif fn in (load_tile, store_tile):
                arguments = params["pytree_args"].num_leaves
                transforms = jax.tree.unflatten(params["pytree_ref_transforms"], eqn.invars[arguments:])
                at = of_transforms(eqn.invars[0], transforms[0])
                (write if fn is store_tile else read)(at, eqn.invars[0].aval.shape)
            else:
                assert not any(shared_memory(x) for x in eqn.invars), f"{fn} is not known here"
        elif name == "wait_smem_to_gmem":
            del warps.sent[: max(len(warps.sent) - params["n"], 0)]
            warps.barrier()
        elif name == "barrier_arrive":
            arrived = eqn.invars[0]
        elif name == "barrier_wait" and eqn.invars[0] is arrived:  # (`meet`; TMA's arrivals are waited for by each)
            warps.barrier()
        elif name == "cond":
            index, states = value(eqn.invars[0]), []
            for branch in params["branches"] if index is None else [params["branches"][index]]:
                if any(isinstance(x.params.get("mgpu_fn"), Anything) for x in branch.jaxpr.eqns):
                    continue  # never taken
                inside = enter(branch.jaxpr, [*branch.consts, *eqn.invars[1:]])
                states.append(
                    warps.then(lambda after, branch=branch, inside=inside: follow(branch.jaxpr, inside, after))
                )
            for places in warps.places:
                places.clear()
            for state in states:
                warps.add(state)
        elif name == "scan":
            loop(params["jaxpr"], eqn.invars, warps, enter)
        elif name == "while":
            loop(params["body_jaxpr"], eqn.invars[params["cond_nconsts"] :], warps, enter)
        else:
            for inner in params.values():
                for closed in inner if isinstance(inner, tuple | list) else [inner]:
                    inside = getattr(closed, "jaxpr", closed)
                    if hasattr(inside, "eqns"):
                        outer = [*(closed.consts if closed is not inside else ()), *eqn.invars]
                        variables = len(inside.constvars) + len(inside.invars)
                        outer = (outer + [None] * variables)[:variables]
                        follow(inside, enter(inside, outer), warps)


def loop(body, given, warps, enter):
    inside = enter(body.jaxpr, [*body.consts, *given])
    for _ in range(ROUNDS):
        env = dict(inside)
        follow(body.jaxpr, env, warps)
        consts = len(body.jaxpr.invars) - len(body.jaxpr.outvars)
        for variable, out in zip(body.jaxpr.invars[consts:], body.jaxpr.outvars, strict=False):
            known = int(out.val) if isinstance(out, Literal) and out.aval.dtype.kind in "iub" else env.get(out)
            if isinstance(known, int):
                inside[variable] = known
            elif isinstance(inside.get(variable), int):
                del inside[variable]


# K, V, and whether documents, states in and out, and groups of heads take part. All are cut into pieces.
KINDS = {
    "one warpgroup": (64, 64, False),
    "two warpgroups": (128, 128, False),
    "two values to a key": (64, 128, False),
    "two keys to a value": (128, 64, True),
    "everything": (64, 64, True),
    "everything, two warpgroups": (128, 128, True),
    "wide head": (256, 512, True),
}


def kernels_of(K, V, everything, T=1024):
    """{name: hazards} of the kernels of a forward and backward."""

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    H, G = 2, 1 if everything else 2
    inputs = [array(1, T, H, K), array(1, T, G, K), array(1, T, G, V), array(1, T, G, K)]
    do, state, documents = array(1, T, H, V), array(1, H, K, V, dtype=jnp.float32), array(1, T, dtype=jnp.int32)

    def both(do, state, documents, *inputs):
        def call(state, *inputs):
            return mosaic_gpu.gated_linear_attention(
                *inputs, scale=1.0, initial_state=state if everything else None, return_final_state=everything,
                segment_ids=documents if everything else None,
            )  # fmt: skip

        o, vjp = jax.vjp(call, state, *inputs)
        return o, vjp((do, state) if everything else do)

    found = {}

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "mpmd_map":
                (kernel,), (mesh,) = eqn.params["jaxprs"], eqn.params["meshes"]
                for w in range(mesh.num_threads or 1):
                    found.setdefault(eqn.params["name"], []).extend(hazards(getattr(kernel, "jaxpr", kernel), w))
                continue
            for inner in jaxprs_in_params(eqn.params):
                look(inner)

    look(jax.make_jaxpr(both)(do, state, documents, *inputs).jaxpr)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_warps_wait_for_each_other(kind):
    found = kernels_of(*KINDS[kind])
    assert len(found) >= 4
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("module", "kind", "kernel"),
    [(backward, "one warpgroup", "gla_backward"), (forward_tiers, "two warpgroups", "gla_forward_saving"),
     (finish, "wide head", "gla_finish")],
)  # fmt: skip
def test_a_barrier_that_is_missing_is_seen(monkeypatch, module, kind, kernel):
    monkeypatch.setattr(module, "settle", lambda barrier=None: None)
    jax.clear_caches()
    found = kernels_of(*KINDS[kind])
    jax.clear_caches()  # of kernels traced so
    assert found[kernel]
