"""Search: the best choice per site (bits, sparsity, width) that fits a device's limits."""

from jaxcompress.search.automatic import compress
from jaxcompress.search.fine_tuning import Training, finetune
from jaxcompress.search.options import Option, integer_options
from jaxcompress.search.plan import Plan, load_plan
from jaxcompress.search.problem import Budget, Choice, Problem
from jaxcompress.search.searcher import Compressed, Search
from jaxcompress.search.sensitivities.curvature import curvature, hessian_trace
from jaxcompress.search.sensitivities.evaluator import Evaluator
from jaxcompress.search.sensitivities.measured import Sensitivity, cross_entropy, kl
from jaxcompress.search.sensitivities.one_site import sensitivity
from jaxcompress.search.solvers.baselines import evolve, greedy
from jaxcompress.search.solvers.knapsack import Infeasible, Solution, allocate, rerank
from jaxcompress.search.solvers.pareto_front import Front, front
from jaxcompress.search.student_family import (
    Student,
    effective_parameters,
    students,
    train_students,
)
from jaxcompress.search.width_choice import WidthChoice
from jaxcompress.search.widths import narrow

__all__ = [
    "Budget",
    "Choice",
    "Compressed",
    "Evaluator",
    "Front",
    "Infeasible",
    "Option",
    "Plan",
    "Problem",
    "Search",
    "Sensitivity",
    "Solution",
    "Student",
    "Training",
    "WidthChoice",
    "allocate",
    "compress",
    "cross_entropy",
    "curvature",
    "effective_parameters",
    "evolve",
    "finetune",
    "front",
    "greedy",
    "hessian_trace",
    "integer_options",
    "kl",
    "load_plan",
    "narrow",
    "rerank",
    "sensitivity",
    "students",
    "train_students",
]
