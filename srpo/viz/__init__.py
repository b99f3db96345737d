"""Pictures of token credit: a page, a figure for papers, a table for terminals, and the report of a run.

    from srpo.viz import credit_html, credit_records

Nothing here loads more than torch: matplotlib and rich are asked for by the functions that draw with them.
"""

from srpo.viz.figure import credit_figure
from srpo.viz.lines import append_records, read_records
from srpo.viz.page import CreditPage, credit_html
from srpo.viz.record import CreditRecord, credit_records
from srpo.viz.table import CreditTable, credit_table

__all__ = [
    "CreditPage",
    "CreditRecord",
    "CreditTable",
    "append_records",
    "credit_figure",
    "credit_html",
    "credit_records",
    "credit_table",
    "read_records",
]
