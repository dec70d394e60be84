"""Who may use how much bandwidth, power, processor and encryption, so that many devices fine-tune for least energy.

N devices fine-tune through one server. In a round, device n encrypts its d_n samples at f_n cycles/s, uploads them in a
band B_n of a shared channel at power p_n, and the server evaluates them at F_n cycles/s, all within the deadline T_n:

    C / f + t + S / F + download <= T,   t = d L_up / (B log2(1 + g p / (N0 B))),   sum B_n <= B,   sum F_n <= F.

The tier, a set of encryption parameters, decides the cycles C = c_enc d and S = c_srv d, the bits d L_up, and the
security s. `allocate` minimises

    sum_n kappa_n C f^2 + p t + kappa_s S F^2 - alpha sum_n omega_n s

after "PrivTuner with Homomorphic Encryption and LoRA: A P3EFT Scheme" (Li, Yu, Zhao, arXiv 2410.00433), whose problem
this restates in the notation usual for it. Needs NumPy and SciPy.
"""

from privtuner.wireless.allocation import Allocation, UncertifiedWarning, allocate
from privtuner.wireless.cells import Cell
from privtuner.wireless.files import default_tiers, load_system, load_tiers, save_tiers
from privtuner.wireless.methods import METHODS
from privtuner.wireless.model import SECURITY_FLOOR, Channel, Device, Server, System, Tier

__all__ = [
    "METHODS",
    "SECURITY_FLOOR",
    "Allocation",
    "Cell",
    "Channel",
    "Device",
    "Server",
    "System",
    "Tier",
    "UncertifiedWarning",
    "allocate",
    "default_tiers",
    "load_system",
    "load_tiers",
    "save_tiers",
]
