"""The one label that is no class.

Every segmentation set that the field uses marks some pixels as "do not ask": unlabelled,
void, out of scope, or padding that an image processor added. ADE20K (after its shift by
one), PASCAL VOC, Cityscapes and COCO-Stuff all write 255 for them, because their masks are
8-bit images and 255 is the last value that fits. So do we: a pixel or token with this label
is left out of fitting and out of every score.

Labels are held in wide integers (int64), never in uint8: there ``0 - 1`` wraps round to 255
and ``255 + 1`` to 0, so one careless shift turns "ignored" into a class without any error.

>>> from interp.labels import IGNORE
>>> IGNORE
255
"""

IGNORE = 255
