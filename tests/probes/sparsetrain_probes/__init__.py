"""Five toy methods as another package would bring them: each kind of edit that the frame has to carry, one file each.

They are loaded by the entry point beside this package, and go through the same contract as the methods of sparsetrain.
"""

from sparsetrain_probes.concept_head import ToyConcepts as ToyConcepts
from sparsetrain_probes.convolution_mask import ToyConvolutionMask as ToyConvolutionMask
from sparsetrain_probes.entries import ToyEntries as ToyEntries
from sparsetrain_probes.low_rank import ToyLowRank as ToyLowRank
from sparsetrain_probes.widening import ToyWidening as ToyWidening
