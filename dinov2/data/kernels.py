"""The inner loops of the augmentation, compiled by numba: drawing crop parameters and the photometric pass.

Colours are handled as planar float32 rows of about a thousand pixels, which stay in the first-level cache and fill
vector registers. Every operation rounds as Pillow does on uint8 images (towards zero, clipped), so that the result of a
chain is Pillow's. Every constant is float32: one float64 in an expression would halve the number of vector lanes.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

f4 = np.float32

# What happens to one crop, drawn beforehand. Pixels of the source image for the window, uint8 levels elsewhere.
CROP = np.dtype(
    [
        ("top", np.int32),
        ("left", np.int32),
        ("height", np.int32),
        ("width", np.int32),
        ("turns", np.int32),  # quarter turns, counter-clockwise, after the flips
        ("horizontal_flip", np.bool_),
        ("vertical_flip", np.bool_),
        ("jitter", np.bool_),  # whether the four factors below apply
        ("grayscale", np.bool_),
        ("solarize", np.bool_),
        ("order", np.int8, (4,)),  # of brightness 0, contrast 1, saturation 2, hue 3
        ("brightness", np.float32),
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),  # shift in turns of the colour circle
        ("sigma", np.float32),  # of the blur, pixels; 0: none
        ("stain", np.float32, (3,)),  # factor on the optical density of haematoxylin, eosin, DAB
    ],
    align=True,
)

# From which distributions the parameters of one view are drawn; see DataAugmentationDINO.
VIEW = np.dtype(
    [
        ("scale", np.float64, (2,)),
        *(
            (name, np.float64)
            for name in (
                "horizontal_flip",
                "vertical_flip",
                "rotate90",
                "color_jitter",
                "brightness",
                "contrast",
                "saturation",
                "hue",
                "grayscale",
                "blur",
                "solarize",
                "hed_jitter",
            )
        ),
        ("blur_sigma", np.float64, (2,)),
    ],
    align=True,
)

WINDOW_TRIES = 10
UNIFORMS_PER_CROP = 4 * WINDOW_TRIES + 20
BLOCK = 1024  # pixels handled at a time
BLUR_RADIUS = 4
SOLARIZE_THRESHOLD = 128
RGB_DENSITY_OF_STAINS = np.array(  # haematoxylin, eosin, DAB: Ruifrok and Johnston 2001
    [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]
)
STAINS_OF_RGB_DENSITY = np.linalg.inv(RGB_DENSITY_OF_STAINS)
LOG2_OF_LEVEL = np.log2((np.arange(256) + 1) / 256).astype(np.float32)  # minus the optical density

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # output encodings


def _compiled(function):
    """Compile on first use and keep the machine code on disk; where no folder can be written, compile in each run."""
    # No infinities or NaNs occur, and sums may be reordered: both are needed for vector code.
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "ninf", "nsz", "contract", "reassoc"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "no locator available"
        return njit(**options)(function)


@intrinsic
def _half_bits(typing_context, value):
    """The bits of the nearest float16: numba has no such type on the CPU, the processor has the instruction."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _bits_of(typing_context, value):
    """The bits of a float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float_of(typing_context, bits):
    """The float32 with these bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


# ---------------------------------------------------------------------------------------------- parameters


@_compiled
def draw_crops(uniforms, views, height, width, crops):
    """Turn uniform numbers into crop parameters.

    Args:
        uniforms: `(n, UNIFORMS_PER_CROP)` float64 in [0, 1).
        views: `(n,)` of `VIEW`.
        height: of the image, pixels.
        width: of the image, pixels.
        crops: `(n,)` of `CROP`, filled in.
    """
    for index in range(len(crops)):
        crop, view, u = crops[index], views[index], uniforms[index]
        _draw_window(u, view.scale[0], view.scale[1], height, width, crop)
        k = 4 * WINDOW_TRIES
        crop.horizontal_flip = u[k] < view.horizontal_flip
        crop.vertical_flip = u[k + 1] < view.vertical_flip
        crop.turns = int(u[k + 2] * 4) if view.rotate90 > 0 else 0
        crop.jitter = u[k + 3] < view.color_jitter
        for i in range(4):
            crop.order[i] = i
        for i in range(3):
            j = i + int(u[k + 4 + i] * (4 - i))
            crop.order[i], crop.order[j] = crop.order[j], crop.order[i]
        crop.brightness = _between(max(0.0, 1 - view.brightness), 1 + view.brightness, u[k + 7])
        crop.contrast = _between(max(0.0, 1 - view.contrast), 1 + view.contrast, u[k + 8])
        crop.saturation = _between(max(0.0, 1 - view.saturation), 1 + view.saturation, u[k + 9])
        crop.hue = _between(-view.hue, view.hue, u[k + 10])
        crop.grayscale = u[k + 11] < view.grayscale
        sigma = _between(view.blur_sigma[0], view.blur_sigma[1], u[k + 13])
        crop.sigma = sigma if u[k + 12] < view.blur else 0.0
        crop.solarize = u[k + 14] < view.solarize
        # Three normal deviates by the Box-Muller transform.
        radius = math.sqrt(-2 * math.log(1 - u[k + 15]))
        crop.stain[0] = max(0.0, 1 + view.hed_jitter * radius * math.cos(2 * math.pi * u[k + 16]))
        crop.stain[1] = max(0.0, 1 + view.hed_jitter * radius * math.sin(2 * math.pi * u[k + 16]))
        radius = math.sqrt(-2 * math.log(1 - u[k + 17]))
        crop.stain[2] = max(0.0, 1 + view.hed_jitter * radius * math.cos(2 * math.pi * u[k + 18]))


@_compiled
def _between(low, high, uniform):
    return low + (high - low) * uniform


@_compiled
def _draw_window(u, smallest, largest, height, width, crop):
    """Random area and aspect as torchvision's RandomResizedCrop: ten tries, then the largest allowed central window."""
    for i in range(WINDOW_TRIES):
        area = height * width * _between(smallest, largest, u[4 * i])
        aspect = math.exp(_between(math.log(3 / 4), math.log(4 / 3), u[4 * i + 1]))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            crop.height, crop.width = h, w
            crop.top = int(u[4 * i + 2] * (height - h + 1))
            crop.left = int(u[4 * i + 3] * (width - w + 1))
            return
    h, w = height, width
    if width * 4 < height * 3:
        h = round(width * 4 / 3)
    elif width * 3 > height * 4:
        w = round(height * 4 / 3)
    crop.height, crop.width = h, w
    crop.top, crop.left = (height - h) // 2, (width - w) // 2


# ---------------------------------------------------------------------------------------------- blocks of pixels


@_compiled
def _aligned_rows(rows, length):
    """Float32 rows that each start on a cache line, so that no vector load touches two."""
    stride = (length + 15) // 16 * 16
    memory = np.empty(rows * stride + 16, np.float32)
    skip = (-memory.ctypes.data) % 64 // 4
    return memory[skip : skip + rows * stride].reshape(rows, stride)


@_compiled
def _load_pixels(source, start, count, block, at):
    """Interleaved uint8 pixels to planar floats."""
    red, green, blue = block[0, at : at + count], block[1, at : at + count], block[2, at : at + count]
    pixels = source[3 * start : 3 * (start + count)]
    for i in range(count):
        red[i], green[i], blue[i] = f4(pixels[3 * i]), f4(pixels[3 * i + 1]), f4(pixels[3 * i + 2])


@_compiled
def _load_column(source, column, size, block, at):
    for i in range(size):
        k = 3 * (i * size + column)
        block[0, at + i], block[1, at + i], block[2, at + i] = f4(source[k]), f4(source[k + 1]), f4(source[k + 2])


@_compiled
def _reverse_rows(block, rows, size, scratch):
    for channel in range(3):
        for row in range(rows):
            line = block[channel, row * size : (row + 1) * size]
            for i in range(size):
                scratch[i] = line[i]
            for i in range(size):
                line[i] = scratch[np.uintp(size - 1 - i)]  # unsigned: no test for an index from the end


@_compiled
def _load_planes(planes, start, count, block):
    for channel in range(3):
        plane, line = planes[channel, start : start + count], block[channel]
        for i in range(count):
            line[i] = f4(plane[i])


@_compiled
def _store_planes(block, count, planes, start):
    for channel in range(3):
        plane, line = planes[channel, start : start + count], block[channel]
        for i in range(count):
            plane[i] = np.uint8(line[i])


@_compiled
def _between_0_and(value, top):
    # In this form each line is one vector instruction.
    value = value if value < top else top
    return value if value > f4(0) else f4(0)


@_compiled
def _level(value):
    """To a whole level between 0 and 255, towards zero."""
    return np.floor(_between_0_and(value, f4(255)))


@_compiled
def _luma(red, green, blue):
    """Pillow's integer Rec. 601 luma; exact, since every product stays below 2 ** 24."""
    return np.floor((red * f4(19595) + green * f4(38470) + blue * f4(7471) + f4(32768)) * f4(1 / 65536))


@_compiled
def _brightness(block, count, factor):
    for channel in range(3):
        for i in range(count):
            block[channel, i] = _level(block[channel, i] * factor)


@_compiled
def _contrast(block, count, factor, mean):
    for channel in range(3):
        for i in range(count):
            block[channel, i] = _level(mean + factor * (block[channel, i] - mean))


@_compiled
def _saturation(block, count, factor):
    red, green, blue = block[0], block[1], block[2]
    for i in range(count):
        luma = _luma(red[i], green[i], blue[i])
        red[i] = _level(luma + factor * (red[i] - luma))
        green[i] = _level(luma + factor * (green[i] - luma))
        blue[i] = _level(luma + factor * (blue[i] - luma))


@_compiled
def _grayscale(block, count):
    red, green, blue = block[0], block[1], block[2]
    for i in range(count):
        luma = _luma(red[i], green[i], blue[i])
        red[i] = luma
        green[i] = luma
        blue[i] = luma


@_compiled
def _luma_sum(block, count):
    red, green, blue = block[0], block[1], block[2]
    total = f4(0)  # below 2 ** 24 for a block, so exact
    for i in range(count):
        total += _luma(red[i], green[i], blue[i])
    return total


@_compiled
def _hue(block, count, shift):
    """Turn the colour circle by `shift` of 256 steps, with Pillow's 8-bit hue and saturation."""
    red, green, blue = block[0], block[1], block[2]
    for i in range(count):
        r, g, b = red[i], green[i], blue[i]
        value = r if r > g else g
        value = value if value > b else b
        lowest = r if r < g else g
        lowest = lowest if lowest < b else b
        chroma = value - lowest
        some_chroma = chroma if chroma > f4(1) else f4(1)
        some_value = value if value > f4(1) else f4(1)
        # One division serves both; the rounding error it adds is far below the distance of the quotients to the next
        # step, which is at least 1 / 255.
        reciprocal = f4(1) / (some_chroma * some_value)
        hue = f4(4) * some_chroma + (r - g)
        hue = f4(2) * some_chroma + (b - r) if g == value else hue
        hue = g - b if r == value else hue
        hue = hue if hue >= f4(0) else hue + f4(6) * some_chroma
        hue = np.floor(hue * (some_value * reciprocal) * f4(255 / 6) + f4(1e-3)) + shift
        hue = hue if hue < f4(256) else hue - f4(256)
        hue = hue if hue >= f4(0) else hue + f4(256)
        hue = hue * f4(6 / 255)
        saturation = np.floor(f4(255) * chroma * (some_chroma * reciprocal) + f4(1e-3))
        reach = value * saturation * f4(1 / 255)
        top = value + f4(0.5)
        red[i] = np.floor(top - reach * _between_0_and(f4(2) - abs(hue - f4(3)), f4(1)))
        green[i] = np.floor(top - reach * _between_0_and(abs(hue - f4(2)) - f4(1), f4(1)))
        blue[i] = np.floor(top - reach * _between_0_and(abs(hue - f4(4)) - f4(1), f4(1)))


@_compiled
def _exp2(x):
    """2 ** x for -30 < x < 30, to 4e-6 relative: the exponent's bits times a polynomial in the fraction."""
    whole = np.floor(x)
    f = x - whole
    power = _float_of(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))
    polynomial = f4(0.0520114) + f * f4(0.013534167)
    polynomial = f4(0.24144275) + f * polynomial
    polynomial = f4(0.69300383) + f * polynomial
    return power * (f4(1.0000026) + f * polynomial)


@_compiled
def _stain(block, count, factors):
    """Scale the optical densities of the stains (Tellez et al. 2018), in base-2 logarithms."""
    m = np.zeros((3, 3), np.float32)
    for i in range(3):
        for j in range(3):
            for s in range(3):
                m[i, j] += f4(STAINS_OF_RGB_DENSITY[i, s] * factors[s] * RGB_DENSITY_OF_STAINS[s, j])
    for channel in range(3):
        for i in range(count):
            block[channel, i] = LOG2_OF_LEVEL[np.uint8(block[channel, i])]
    red, green, blue = block[0], block[1], block[2]
    for i in range(count):
        r, g, b = red[i], green[i], blue[i]
        for channel in range(3):
            density = r * m[0, channel] + g * m[1, channel] + b * m[2, channel]
            density = density if density > f4(-20) else f4(-20)
            block[channel, i] = _level(_exp2(density + f4(8)) - f4(0.5))


# ---------------------------------------------------------------------------------------------- whole crops


@_compiled
def _emit(line, count, solarize, scale, offset, encoding, target16, target32, start):
    """Solarise, normalise and cast pixels of one channel into their place in the batch."""
    if solarize:
        for i in range(count):
            line[i] = f4(255) - line[i] if line[i] >= f4(SOLARIZE_THRESHOLD) else line[i]
    if encoding == FLOAT32:
        out32 = target32[start : start + count]
        for i in range(count):
            out32[i] = line[i] * scale + offset
    elif encoding == FLOAT16:
        out16 = target16[start : start + count]
        for i in range(count):
            out16[i] = _half_bits(line[i] * scale + offset)
    else:
        out16 = target16[start : start + count]
        for i in range(count):
            bits = _bits_of(line[i] * scale + offset)
            bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
            out16[i] = np.uint16(bits >> np.uint32(16))


@_compiled
def _emit_plane(plane, solarize, scale, offset, encoding, target16, target32, line):
    for start in range(0, len(plane), BLOCK):
        pixels = plane[start : start + BLOCK]
        for i in range(len(pixels)):
            line[i] = f4(pixels[i])
        _emit(line, len(pixels), solarize, scale, offset, encoding, target16, target32, start)


@_compiled
def _apply(operation, block, count, crop, mean):
    if operation == 0:
        _brightness(block, count, crop.brightness)
    elif operation == 1:
        _contrast(block, count, crop.contrast, mean)
    elif operation == 2:
        _saturation(block, count, crop.saturation)
    else:
        _hue(block, count, f4(int(crop.hue * f4(255))))  # torchvision truncates the shift to whole steps


@_compiled
def _load_block(source, crop, size, first_row, rows, block, scratch):
    """Rows of the finished geometry: flips and quarter turns only change which row is read and which way it runs."""
    reverse, upside_down = crop.horizontal_flip, crop.vertical_flip
    if crop.turns >= 2:  # half a turn is both flips
        reverse, upside_down = not reverse, not upside_down
    if crop.turns % 2 == 1:  # counter-clockwise: out[y, x] = in[x, size - 1 - y]
        for row in range(rows):
            y = first_row + row
            _load_column(source, y if reverse else size - 1 - y, size, block, row * size)
        reverse = upside_down
    elif upside_down:
        for row in range(rows):
            _load_pixels(source, (size - 1 - first_row - row) * size, size, block, row * size)
    else:
        _load_pixels(source, first_row * size, rows * size, block, 0)
    if reverse:
        _reverse_rows(block, rows, size, scratch)


@_compiled
def _blur_taps(sigma):
    """The middle tap and the four beside it; the outer two are left out where they add less than a quarter level."""
    taps = np.empty(BLUR_RADIUS + 1, np.float32)
    for i in range(BLUR_RADIUS + 1):
        taps[i] = math.exp(-0.5 * (i / sigma) ** 2)
    outer = taps[3] + taps[4]
    inner = taps[0] + 2 * (taps[1] + taps[2])
    if outer < 5e-4 * inner:
        taps[3] = taps[4] = f4(0)
        outer = f4(0)
    return taps / f4(inner + 2 * outer)


@_compiled
def _mirror(i, size):
    i = -i if i < 0 else i
    return 2 * (size - 1) - i if i >= size else i


@_compiled
def _blur_row(plane, start, size, taps, padded, out):
    """Horizontal pass over one row, with the border pixels mirrored around the outermost one."""
    middle, pixels = padded[BLUR_RADIUS : BLUR_RADIUS + size], plane[start : start + size]
    for i in range(size):
        middle[i] = f4(pixels[i])
    for i in range(1, BLUR_RADIUS + 1):
        padded[BLUR_RADIUS - i] = padded[BLUR_RADIUS + i]
        padded[BLUR_RADIUS + size - 1 + i] = padded[BLUR_RADIUS + size - 1 - i]
    t0, t1, t2, t3, t4 = taps[0], taps[1], taps[2], taps[3], taps[4]
    if t3 == f4(0):
        for i in range(size):
            out[i] = t0 * padded[i + 4] + t1 * (padded[i + 3] + padded[i + 5]) + t2 * (padded[i + 2] + padded[i + 6])
        return
    for i in range(size):
        near = t0 * padded[i + 4] + t1 * (padded[i + 3] + padded[i + 5]) + t2 * (padded[i + 2] + padded[i + 6])
        out[i] = near + t3 * (padded[i + 1] + padded[i + 7]) + t4 * (padded[i] + padded[i + 8])


@_compiled
def _blur_column(ring, middle, size, taps, line):
    """Vertical pass: one row out of the nine around it, which lie in the ring from `middle` on."""
    window = 2 * BLUR_RADIUS + 1
    k0, k1, k2 = middle % window, (middle + 1) % window, (middle + 2) % window
    k3, k4, k5 = (middle + 3) % window, (middle + 4) % window, (middle + 5) % window
    k6, k7, k8 = (middle + 6) % window, (middle + 7) % window, (middle + 8) % window
    t0, t1, t2, t3, t4 = taps[0], taps[1], taps[2], taps[3], taps[4]
    # Two loops: LLVM vectorises none with more than eight rows that it must prove apart from the target.
    for i in range(size):
        near = t0 * ring[k4, i] + t1 * (ring[k3, i] + ring[k5, i]) + t2 * (ring[k2, i] + ring[k6, i])
        line[i] = near + f4(0.5)
    if t3 > f4(0):
        for i in range(size):
            line[i] += t3 * (ring[k1, i] + ring[k7, i]) + t4 * (ring[k0, i] + ring[k8, i])
    for i in range(size):
        line[i] = np.floor(line[i])


@_compiled
def _blur_plane(plane, size, taps, solarize, scale, offset, encoding, target16, target32, line, padded, ring):
    """Blur one channel, keeping the horizontally blurred rows around the current one in the ring."""
    window = 2 * BLUR_RADIUS + 1
    for y in range(-BLUR_RADIUS, size + BLUR_RADIUS):
        _blur_row(plane, _mirror(y, size) * size, size, taps, padded, ring[(y + BLUR_RADIUS) % window])
        middle = y - BLUR_RADIUS
        if middle >= 0:
            _blur_column(ring, middle, size, taps, line)
            _emit(line, size, solarize, scale, offset, encoding, target16, target32, middle * size)


@_compiled
def _colour_planes(source, crop, size, block, planes, scratch):
    """Everything before the blur, into uint8 planes."""
    area = size * size
    rows_at_once = max(1, BLOCK // size)
    stained = crop.stain[0] != f4(1) or crop.stain[1] != f4(1) or crop.stain[2] != f4(1)
    contrast_at, mean = 0, f4(0)
    if (
        crop.jitter
    ):  # contrast pulls towards the mean luma, so that what comes before it is done on the whole crop first
        while crop.order[contrast_at] != 1:
            contrast_at += 1
        total = 0.0
        for first_row in range(0, size, rows_at_once):
            rows = min(rows_at_once, size - first_row)
            count = rows * size
            _load_block(source, crop, size, first_row, rows, block, scratch)
            if stained:
                _stain(block, count, crop.stain)
            for k in range(contrast_at):
                _apply(crop.order[k], block, count, crop, mean)
            total += _luma_sum(block, count)
            _store_planes(block, count, planes, first_row * size)
        mean = f4(int(total / area + 0.5))
    for first_row in range(0, size, rows_at_once):
        rows = min(rows_at_once, size - first_row)
        start, count = first_row * size, rows * size
        if crop.jitter:
            _load_planes(planes, start, count, block)
            for k in range(contrast_at, 4):
                _apply(crop.order[k], block, count, crop, mean)
        else:
            _load_block(source, crop, size, first_row, rows, block, scratch)
            if stained:
                _stain(block, count, crop.stain)
        if crop.grayscale:
            _grayscale(block, count)
        _store_planes(block, count, planes, start)


@_compiled
def render_crops(sources, crops, size, scale, offset, encoding, out16, out32, rows):
    """Colour, blur, normalise and cast square crops of one size into their places in a batch.

    Args:
        sources: `(n, size * size * 3)` uint8, resized crops before flips and turns.
        crops: `(n,)` of `CROP`.
        size: side of the crops, pixels.
        scale: `(3,)` float32; a level `v` of channel `c` becomes `v * scale[c] + offset[c]`.
        offset: `(3,)` float32.
        encoding: `FLOAT32`, `FLOAT16` or `BFLOAT16`.
        out16: `(N, 3, size * size)` uint16, the bits of 16-bit outputs; unused for `FLOAT32`.
        out32: the same in float32; unused for the others.
        rows: `(n,)` which of the N rows each crop fills.
    """
    block = _aligned_rows(3, max(BLOCK, size))
    planes = np.empty((3, size * size), np.uint8)
    scratch = np.empty(size, np.float32)
    padded = np.empty(size + 2 * BLUR_RADIUS, np.float32)
    ring = _aligned_rows(2 * BLUR_RADIUS + 1, size)
    for i in range(len(crops)):
        crop, row = crops[i], rows[i]
        _colour_planes(sources[i], crop, size, block, planes, scratch)
        taps = _blur_taps(crop.sigma) if crop.sigma > f4(0) else padded
        # One channel after the other: the memory system keeps up with one stream of stores, not with three.
        for c in range(3):
            a, b, line = scale[c], offset[c], block[0]
            target16 = out16[row, c] if encoding != FLOAT32 else out16[0, 0]
            target32 = out32[row, c] if encoding == FLOAT32 else out32[0, 0]
            if crop.sigma > f4(0):
                _blur_plane(
                    planes[c], size, taps, crop.solarize, a, b, encoding, target16, target32, line, padded, ring
                )
            else:
                _emit_plane(planes[c], crop.solarize, a, b, encoding, target16, target32, line)
