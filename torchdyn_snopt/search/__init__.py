"""Architecture search over the horizon t1 with Optuna.

- `HorizonObjective`: one training run per trial, for any ``study.optimize``;
- `fixed_t1`, `one_run`, `joint`: what a trial may choose, as functions of the trial;
- `compare_horizon_search`: SNOpt's policy against searches for t1, on equal terms; `HorizonSearch`
  is the same in pieces, for several processes on one storage;
- `plot_comparison`, `write_report`: what was found;
- `serve_dashboard`: the web page; `report_callback`: Lightning.
"""

from torchdyn_snopt.search.arms import ARMS, DEFAULT_ARMS
from torchdyn_snopt.search.compare import HorizonSearch, compare_horizon_search, settings_of
from torchdyn_snopt.search.dashboard import serve_dashboard
from torchdyn_snopt.search.figures import plot_comparison
from torchdyn_snopt.search.lightning import report_callback
from torchdyn_snopt.search.objective import HorizonObjective, TrialFailedError
from torchdyn_snopt.search.outcome import Guards, Penalized, Progress, Tradeoff
from torchdyn_snopt.search.report import show_on_dashboard, write_report
from torchdyn_snopt.search.results import Comparison, TrialRecord, Verdict, arm_table
from torchdyn_snopt.search.settings import SearchSettings
from torchdyn_snopt.search.spaces import Choice, fixed_t1, joint, one_run
from torchdyn_snopt.search.storage import StudyStorage, default_url, open_storage
from torchdyn_snopt.search.worker import Ending, Observer, StoppedError

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "Choice",
    "Comparison",
    "Ending",
    "Guards",
    "HorizonObjective",
    "HorizonSearch",
    "Observer",
    "Penalized",
    "Progress",
    "SearchSettings",
    "StoppedError",
    "StudyStorage",
    "Tradeoff",
    "TrialFailedError",
    "TrialRecord",
    "Verdict",
    "arm_table",
    "compare_horizon_search",
    "default_url",
    "fixed_t1",
    "joint",
    "one_run",
    "open_storage",
    "plot_comparison",
    "report_callback",
    "serve_dashboard",
    "settings_of",
    "show_on_dashboard",
    "write_report",
]
