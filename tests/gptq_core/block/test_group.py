"""One input group: each member is solved with its own config, together with those of the same config."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gptq_core import QuantizeConfig
from gptq_core.block.group import Member, solve_group
from gptq_core.method import solver
from gptq_core.method.factor import factorize
from gptq_core.method.hessian import Hessian
from gptq_core.runtime.timing import Stages

OWN = QuantizeConfig(bits=4, group_size=32)


def hessian():
    found = Hessian(64, torch.device("cpu"))
    found.add(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))
    return found


def solved(members):
    return {name: (s, report) for name, s, report in solve_group(members, hessian(), None, Stages(torch.device("cpu")))}


@pytest.mark.parametrize(
    "changes", [{"bits": 8}, {"group_size": 16}, {"sym": False}, {"damp_percent": 0.9}, {"desc_act": True}, {"refit": False}], ids=str
)
def test_each_member_is_solved_with_its_own_config(changes):
    config = QuantizeConfig(bits=4, group_size=32, dynamic={"b": changes})
    torch.manual_seed(1)
    members = [Member(name, torch.randn(32, 64), config.for_linear(name)) for name in "abc"]
    together = solved(members)
    assert together.keys() == {"a", "b", "c"}
    for member in members:
        [(alone, report)] = solved([member]).values()
        found, told = together[member.name]
        for key in ("codes", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(found, key), getattr(alone, key)), (member.name, key)
        assert {key: told[key] for key in ("bits", "group_size", "damp_percent")} == {
            key: report[key] for key in ("bits", "group_size", "damp_percent")
        }
    other = solved([Member("b", members[1].weight, OWN)])["b"][0]
    assert any(not torch.equal(getattr(together["b"][0], key), getattr(other, key)) for key in ("codes", "scales")), "the rule shows"


def test_squares_leave_as_soon_as_they_are_not_needed(monkeypatch):
    """With products in bfloat16 the factor goes before rows are solved, and their operands before anybody is told of a solution."""
    squares, alive, prepare, solve_prepared = {}, {}, solver.prepare, solver.solve_prepared

    def held():
        return {name for name, storage in squares.items() if not storage.expired()}

    def factoring(*arguments):
        factor = factorize(*arguments)
        squares["factor"] = StorageWeakRef(factor.lower.untyped_storage())
        return factor

    def preparing(*arguments):
        prepared = prepare(*arguments)
        squares["operand"] = StorageWeakRef(prepared.lower.untyped_storage())
        return prepared

    def solving(*arguments):
        alive["solving"] = held()
        return solve_prepared(*arguments)

    monkeypatch.setattr(solver, "prepare", preparing)
    monkeypatch.setattr(solver, "solve_prepared", solving)
    member = Member("a", torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16(), OWN)
    for _ in solve_group([member], hessian(), None, Stages(torch.device("cpu")), factoring):
        alive["told"] = held()
    assert alive == {"solving": {"operand"}, "told": set()}
