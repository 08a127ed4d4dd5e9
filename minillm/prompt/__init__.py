"""Virtual tokens before the text, trained while the model stays as it is: prompt tuning, P-tuning, prefix tuning.

Reading order: config, virtual, cache, prompted, peft_config, peft_format.
"""

from minillm.prompt.config import PromptConfig
from minillm.prompt.peft_format import load, save
from minillm.prompt.prompted import Prompted, add

__all__ = ["PromptConfig", "Prompted", "add", "load", "save"]
