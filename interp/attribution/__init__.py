"""Which heads, reading from which tokens, move a token to its class.

* `head_attribution` answers by an exact sum, by gradients or by knockouts (`heads`);
* `attribute` screens by gradients and verifies by knockouts (`screen`);
* `path_attribution` follows one head's effect through another (`paths`);
* `minimal_heads` finds the fewest heads that carry it (`minimal`).

What is explained is a target (`targets`), from which tokens is said by source groups (`sources`).
"""

from __future__ import annotations
