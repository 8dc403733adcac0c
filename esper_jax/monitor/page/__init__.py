"""One page of HTML that tells of a run; it needs no network and no script."""

from esper_jax.monitor.page.document import MARK, page
from esper_jax.monitor.page.records import Records
from esper_jax.monitor.page.training import training_page

__all__ = ["MARK", "Records", "page", "training_page"]
