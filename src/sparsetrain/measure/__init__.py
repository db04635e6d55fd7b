"""Measuring: memory by component, time as interleaved ratios, the machine, and the report against the dense model."""

from sparsetrain.measure.components import COMPONENTS as COMPONENTS
from sparsetrain.measure.machine import Machine as Machine
from sparsetrain.measure.machine import describe_machine as describe_machine
from sparsetrain.measure.memory import PeakMemory as PeakMemory
from sparsetrain.measure.memory import SavedActivations as SavedActivations
from sparsetrain.measure.memory import StaticMemory as StaticMemory
from sparsetrain.measure.memory import peak_memory as peak_memory
from sparsetrain.measure.memory import record_saved as record_saved
from sparsetrain.measure.memory import reset_peak as reset_peak
from sparsetrain.measure.memory import saved_activations as saved_activations
from sparsetrain.measure.memory import static_memory as static_memory
from sparsetrain.measure.report import build_report as build_report
from sparsetrain.measure.report import load_report as load_report
from sparsetrain.measure.report import render_text as render_text
from sparsetrain.measure.report import write_report as write_report
from sparsetrain.measure.step_profile import Profile as Profile
from sparsetrain.measure.step_profile import profile as profile
from sparsetrain.measure.timing import Ratio as Ratio
from sparsetrain.measure.timing import StepTime as StepTime
from sparsetrain.measure.timing import compare as compare
from sparsetrain.measure.timing import forward_time_by_component as forward_time_by_component
from sparsetrain.measure.timing import time_step as time_step
