"""The simulator: model, workload, graph, lowering, program, timeline, report.

from simulator import Training, simulate

report = simulate("meta-llama/Llama-3.2-1B", Training(micro_batch=2, seq_len=1024))
print(report.peak.nbytes, report.peak.phase)
"""

from simulator.api import simulate as simulate
from simulator.mesh import Mesh as Mesh
from simulator.model import ModelSpec as ModelSpec
from simulator.plan import Plan as Plan
from simulator.plan import Strategy as Strategy
from simulator.report import Report as Report
from simulator.workload import Optimizer as Optimizer
from simulator.workload import Training as Training
