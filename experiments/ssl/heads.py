"""The baseline with DINO heads after chosen blocks (A.3, Table 6), to tell the method from its size.

--depth 13: Baseline-13, with one more block, as DiRL has its disentangle block. --depth 13 --heads 12 13:
Baseline-13*. Not in the paper: --heads 12 12, two heads on f, separates the effect of two heads from that of
regions.
"""
import torch
from torch import nn

import dirl
from train import Recipe


class HeadsAfterBlocks(dirl.DiRL):
    """DINO with a head on the mean token after each of these blocks (1 is the first; a block may repeat).

    The tokens go through the encoder's closing LayerNorm before the mean, as those of f do.
    """

    def __init__(self, encoder, after, out_dim=65536, norm_last_layer=True):
        super().__init__(encoder, "baseline", out_dim=2)
        self.after = {f"f{number}_block{block}": block for number, block in enumerate(after, 1)}
        self.heads = nn.ModuleDict({
            name: dirl.DINOHead(encoder.embed_dim, out_dim, norm_last_layer=norm_last_layer)
            for name in self.after})

    def represent(self, images, prior):
        x = self.encoder.embed(images)
        means = {}
        for number, block in enumerate(self.encoder.blocks, 1):
            x = block(x)
            if number in self.after.values():
                means[number] = self.encoder.norm(x).mean(1)  # (B, d)
        everywhere = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return ({name: means[block] for name, block in self.after.items()},
                dict.fromkeys(self.after, everywhere))


def build(encoder, args):
    """Returns the Recipe of --heads, whose loss is the mean of the heads' losses."""
    student = HeadsAfterBlocks(encoder, args.heads, args.out_dim, args.norm_last_layer).to(args.device)
    weight = dict.fromkeys(student.heads, 1 / len(student.heads))
    loss = dirl.DiRLLoss(student, student_temp=args.student_temp, center_momentum=args.center_momentum,
                         weight=weight).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss)
