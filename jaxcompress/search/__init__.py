"""Search: the best choice per site (bits, sparsity, width) that fits a device's limits."""

from jaxcompress.search.allocation import Solution, allocate, rerank
from jaxcompress.search.automatic import Compressed, Search, compress, integer_options
from jaxcompress.search.baselines import evolve, greedy
from jaxcompress.search.curvature import curvature, hessian_trace
from jaxcompress.search.evaluator import Evaluator
from jaxcompress.search.measured import Sensitivity, kl
from jaxcompress.search.pareto import Front, front
from jaxcompress.search.plan import Plan, load_plan
from jaxcompress.search.problem import Budget, Choice, Problem
from jaxcompress.search.sensitivity import sensitivity
from jaxcompress.search.students import Student, effective_parameters, students, train_students

__all__ = [
    "Budget",
    "Choice",
    "Compressed",
    "Evaluator",
    "Front",
    "Plan",
    "Problem",
    "Search",
    "Sensitivity",
    "Solution",
    "Student",
    "allocate",
    "compress",
    "curvature",
    "effective_parameters",
    "evolve",
    "front",
    "greedy",
    "hessian_trace",
    "integer_options",
    "kl",
    "load_plan",
    "rerank",
    "sensitivity",
    "students",
    "train_students",
]
