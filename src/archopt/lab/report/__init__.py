"""From the records of a comparison to its tables and its page. Reads files alone; trains and imports nothing else.

from archopt.lab.report import print_table, write_report
page = write_report(Path("runs/demo"))
"""

from archopt.lab.report.load import ReportError
from archopt.lab.report.reproduction import is_reproduction
from archopt.lab.report.statistics import parse_target
from archopt.lab.report.write import print_table, write_report, write_reproduction

__all__ = [
    "ReportError",
    "is_reproduction",
    "parse_target",
    "print_table",
    "write_report",
    "write_reproduction",
]
