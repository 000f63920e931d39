"""Direct-gradient and policy-gradient methods, one file each, and what they share. Imports no torch."""

from leapalign.methods.alignprop import AlignProp
from leapalign.methods.awm import AWM
from leapalign.methods.dance_grpo import DanceGRPO
from leapalign.methods.diffusion_nft import DiffusionNFT
from leapalign.methods.draft import DRaFT
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flow_dppo import FlowDPPO
from leapalign.methods.flow_grpo import FlowGRPO
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.mix_grpo import MixGRPO
from leapalign.methods.refl import ReFL
from leapalign.methods.rsm import RSM

__all__ = [
    "AWM",
    "RSM",
    "AlignProp",
    "DRTune",
    "DRaFT",
    "DRaFTLV",
    "DanceGRPO",
    "DiffusionNFT",
    "FlowBPBridge",
    "FlowBPLagrange",
    "FlowBPSparse",
    "FlowDPPO",
    "FlowGRPO",
    "LeapAlign",
    "MixGRPO",
    "ReFL",
]
