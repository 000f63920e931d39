"""Direct-gradient methods, one file each, and the objective they share. Imports no torch."""

from leapalign.methods.alignprop import AlignProp
from leapalign.methods.draft import DRaFT
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.methods.rsm import RSM

__all__ = [
    "RSM",
    "AlignProp",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "LeapAlign",
    "ReFL",
]
