"""Search: the best choice per site (bits, sparsity, width) that fits a device's limits."""

from jaxcompress.search.baselines import evolve, greedy
from jaxcompress.search.pareto import Front, front
from jaxcompress.search.problem import Budget, Choice, Problem
from jaxcompress.search.sensitivity import Sensitivity, kl, sensitivity
from jaxcompress.search.solve import Solution, rerank, solve
from jaxcompress.search.students import Student, effective_parameters, students, train_students

__all__ = [
    "Budget",
    "Choice",
    "Front",
    "Problem",
    "Sensitivity",
    "Solution",
    "Student",
    "effective_parameters",
    "evolve",
    "front",
    "greedy",
    "kl",
    "rerank",
    "sensitivity",
    "solve",
    "students",
    "train_students",
]
