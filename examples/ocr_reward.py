"""Does the picture show the word in quotation marks? 1: all of it. RapidOCR reads it on the CPU:
`pip install rapidocr-onnxruntime` (Python below 3.13), `--reward examples/ocr_reward.py:ocr`. A
model that draws no letters gets 0 everywhere and learns nothing: begin with one that writes, or add
a smooth reward. Faint letters earn all, and a picture full of words is as many tries."""

import functools
import re

import numpy as np
from rapidocr_onnxruntime import RapidOCR

from rewards import UserError, to_pil


@functools.cache
def engine():  # use_cls would turn short words upside down; to 736 pixels it would take 5 x longer
    return RapidOCR(use_cls=False, intra_op_num_threads=1, det_limit_side_len=256)


def fold(text):
    """What can be told apart: letters and digits, without case, O from 0, or I and l from 1."""
    return re.sub("[^a-z0-9]", "", text.lower()).translate(str.maketrans("01l", "oii"))


def distance(a, b):
    """Letters to change, add or remove (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
    return row[-1]


def ocr(images, prompts):
    """max(0, 1 - distance / length), of the line that is nearest to the word, (B,)."""
    scores = []
    for picture, prompt in zip(to_pil(images), prompts):
        word = fold(re.search('["“](.*?)["”]|$', prompt)[1] or "")
        if len(word) < 3:  # of a ring an O is read
            raise UserError(f'ocr: no word of 3 letters or more in "quotation marks": {prompt}')
        lines, _ = engine()(np.array(picture))  # levels: of floats in [0, 1] it reads nothing
        nearest = min((distance(fold(line[1]), word) for line in lines or []), default=len(word))
        scores.append(max(0.0, 1 - nearest / len(word)))
    return scores
