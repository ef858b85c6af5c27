"""One tracer and one walker over the jaxpr of any pure function."""

from jaxcompress.graph.coupling.dependency_graph import Axes, Group, axes
from jaxcompress.graph.primitives import declare
from jaxcompress.graph.sites import Graph, Site, Tap
from jaxcompress.graph.tracing import trace
from jaxcompress.graph.unentered import Unentered
from jaxcompress.graph.visits.walking import walk

__all__ = ["Axes", "Graph", "Group", "Site", "Tap", "Unentered", "axes", "declare", "trace", "walk"]
