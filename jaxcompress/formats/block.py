"""Float formats with their usual scales: float8, float6, float4, MX, NVFP4, powers of two.

Sources: OCP Microscaling Formats (MX) v1.0; Rouhani et al. 2023, arXiv 2310.10537; NVIDIA,
Pretraining Large Language Models with NVFP4, arXiv 2509.25149, appendix B; Miyashita et al. 2016,
arXiv 1603.01025; Zhou et al. 2017, Incremental Network Quantization, arXiv 1702.03044.
"""

from jaxcompress.formats.floating import E2M1, E2M3, E3M2, E4M3, E5M2, FloatElement, IntElement
from jaxcompress.formats.scaled import Scaled
from jaxcompress.formats.scales import Float8Scale, FloatScale, PowerOfTwoScale


def float8_e4m3() -> Scaled:
    """float8 E4M3 (largest 448, no infinity) times a float32 scale per block.

    >>> import jax.numpy as jnp
    >>> q = float8_e4m3()
    >>> print(q.element.largest, q.fake_quant(jnp.array([1.0, 0.3]), q.qparams(0.0, 448.0)))
    448.0 [1.     0.3125]
    """
    return Scaled(E4M3, FloatScale())


def float8_e5m2() -> Scaled:
    """float8 E5M2 (largest 57344) times a float32 scale per block."""
    return Scaled(E5M2, FloatScale())


def float6_e2m3() -> Scaled:
    """float6 E2M3 (largest 7.5) times a float32 scale per block."""
    return Scaled(E2M3, FloatScale())


def float6_e3m2() -> Scaled:
    """float6 E3M2 (largest 28) times a float32 scale per block."""
    return Scaled(E3M2, FloatScale())


def float4_e2m1() -> Scaled:
    """float4 E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) times a float32 scale per block."""
    return Scaled(E2M1, FloatScale())


def _mx(element: FloatElement | IntElement, label: str) -> Scaled:
    return Scaled(element, PowerOfTwoScale(), group=32, label=label)


def mxfp4() -> Scaled:
    """MXFP4: float4 E2M1 in blocks of 32 under a power of two; 4.25 bits per value.

    Blocks run along the flattened axes that are not `axis`: give the axes that a contraction does
    not sum over, -1 for a Flax kernel.
    """
    return _mx(E2M1, "mxfp4")


def mxfp6_e2m3() -> Scaled:
    """MXFP6: float6 E2M3 in blocks of 32 under a power of two; 6.25 bits per value."""
    return _mx(E2M3, "mxfp6_e2m3")


def mxfp6_e3m2() -> Scaled:
    """MXFP6: float6 E3M2 in blocks of 32 under a power of two; 6.25 bits per value."""
    return _mx(E3M2, "mxfp6_e3m2")


def mxfp8_e4m3() -> Scaled:
    """MXFP8: float8 E4M3 in blocks of 32 under a power of two; 8.25 bits per value."""
    return _mx(E4M3, "mxfp8_e4m3")


def mxfp8_e5m2() -> Scaled:
    """MXFP8: float8 E5M2 in blocks of 32 under a power of two; 8.25 bits per value."""
    return _mx(E5M2, "mxfp8_e5m2")


def mxint8() -> Scaled:
    """MXINT8: int8 * 2**-6 in blocks of 32 under a power of two; 8.25 bits per value.

    Codes are symmetric, up to 127 / 64: -128 is not used.
    """
    return _mx(IntElement("int8_6", 8, 6), "mxint8")


def nvfp4() -> Scaled:
    """NVFP4: float4 E2M1 in blocks of 16 under a float8 E4M3 and one float32 per tensor.

    4.5 bits per value, and 32 bits per tensor.
    """
    return Scaled(E2M1, Float8Scale(), group=16, label="nvfp4")


def power_of_two(bits: int) -> Scaled:
    """0 and +-2**e, bits - 1 bits for the exponent, under a power of two per block.

    Multiplying by a weight is a shift. Rounding is to the nearest number: 1.5 * 2**e is where
    2**(e+1) begins (half even), and half of the smallest magnitude is where zero ends. The largest
    power of a block is the nearest to its absmax.

    Raises:
      ValueError: bits outside 2 to 8.

    >>> import jax.numpy as jnp
    >>> q = power_of_two(3)  # 0, 1/4, 1/2, 1 times 2**e
    >>> print(q.fake_quant(jnp.array([1.0, -0.3, 0.1]), q.qparams(-1.0, 1.0)))
    [ 1.   -0.25  0.  ]
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"power_of_two(bits): bits must be an integer from 2 to 8, got {bits!r}")
    # The largest exponent is 0.
    element = FloatElement(f"pot{bits}", bits - 1, 0, bias=2 ** (bits - 1) - 1)
    return Scaled(element, PowerOfTwoScale(nearest=True))
