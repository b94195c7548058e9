"""A discrete-event simulator of vLLM: requests in, latencies out, on the clock of any step-time model.

It knows nothing of fits, architectures or plots: `simulate` takes a `RequestList`, a `ServerConfig` and a step time.
"""

from stepcal.simulator.config import KvGroup, ServerConfig
from stepcal.simulator.engine import SimulationInterrupted, simulate
from stepcal.simulator.load.arrivals import LoadStage, empirical_lengths, fixed_lengths, generate_arrivals
from stepcal.simulator.load.clients import Clients, stage_starts
from stepcal.simulator.load.conversations import make_conversations
from stepcal.simulator.load.inference_perf import read_workload
from stepcal.simulator.load.replay import replay_requests, replay_trace
from stepcal.simulator.load.shared_prefix import Workload
from stepcal.simulator.load.workload import RequestList, make_requests
from stepcal.simulator.result import SimulationResult
from stepcal.simulator.steptime import CompiledStepTime, StepBatch, StepTime

__all__ = [
    "Clients",
    "CompiledStepTime",
    "KvGroup",
    "LoadStage",
    "RequestList",
    "ServerConfig",
    "SimulationInterrupted",
    "SimulationResult",
    "StepBatch",
    "StepTime",
    "Workload",
    "empirical_lengths",
    "fixed_lengths",
    "generate_arrivals",
    "make_conversations",
    "make_requests",
    "read_workload",
    "replay_requests",
    "replay_trace",
    "simulate",
    "stage_starts",
]
