"""One tracer and one walker over the jaxpr of any pure function."""

from jaxcompress.graph.axes import Axes, Group, axes
from jaxcompress.graph.primitives import declare
from jaxcompress.graph.sites import Graph, Site, Tap
from jaxcompress.graph.trace import trace
from jaxcompress.graph.unentered import Unentered
from jaxcompress.graph.walk import walk

__all__ = ["Axes", "Graph", "Group", "Site", "Tap", "Unentered", "axes", "declare", "trace", "walk"]
