"""From the records of a comparison to its tables and its page. Reads files alone; trains and imports nothing else.

from archopt.lab.report import print_table, write_report
page = write_report(Path("runs/demo"))
"""

from archopt.lab.report.load import ReportError
from archopt.lab.report.statistics import parse_target
from archopt.lab.report.write import print_table, write_report

__all__ = ["ReportError", "parse_target", "print_table", "write_report"]
