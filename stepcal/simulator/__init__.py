"""A discrete-event simulator of vLLM 0.15.1: requests in, latencies out, on the clock of any step-time model.

It knows nothing of fits, architectures or plots: `simulate` takes a `RequestList`, a `ServerConfig` and a step time.
"""

from stepcal.simulator.arrivals import LoadStage, empirical_lengths, fixed_lengths, generate_arrivals
from stepcal.simulator.clients import Clients, stage_starts
from stepcal.simulator.config import KvGroup, ServerConfig
from stepcal.simulator.conversations import make_conversations
from stepcal.simulator.engine import SimulationInterrupted, simulate
from stepcal.simulator.inference_perf import read_workload
from stepcal.simulator.replay import replay_requests, replay_trace
from stepcal.simulator.result import SimulationResult
from stepcal.simulator.shared_prefix import Workload
from stepcal.simulator.steptime import CompiledStepTime, StepBatch, StepTime
from stepcal.simulator.workload import RequestList, make_requests

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
