"""Which heads, reading from which tokens, move a token to its class.

`direct` writes a probe's margin as an exact sum over heads, MLPs and the starting state.
"""

from __future__ import annotations

from interp.attribution.direct import DirectAttribution, direct_attribution

__all__ = ["DirectAttribution", "direct_attribution"]
