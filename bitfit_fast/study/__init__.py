"""Studies: a grid of runs from one file, done once each, and a report of them."""

from .analysis import collect
from .grid import Study
from .reading import read_study, study_of_options
from .report import report_folder, write_report
from .runner import run_study
from .sweeps import Plan, expand

__all__ = [
    "Plan",
    "Study",
    "collect",
    "expand",
    "read_study",
    "report_folder",
    "run_study",
    "study_of_options",
    "write_report",
]
