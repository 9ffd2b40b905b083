"""Every key of a tcq config, with its unit and default. The other files are short changes of this one."""

from ml_collections import ConfigDict, FieldReference


def arguments(text: str, **defaults: str) -> dict[str, str]:
    """The "key=value,key=value" behind the colon of --config=file.py:..., over the defaults. A path may hold commas."""
    found = dict(defaults)
    key = ""
    for piece in text.split(",") if text else []:
        name, equals, value = piece.partition("=")
        if equals and name in defaults:
            key, found[name] = name, value
        elif key and not (equals and name.isidentifier()):
            found[key] += f",{piece}"
        else:
            raise ValueError(
                f"argument {piece!r} is unknown: use {', '.join(f'{k}=...' for k in defaults)}, with commas"
            )
    return found


def set_bits(c: ConfigDict, bits: str) -> None:
    """M codebooks of 16 codewords for so many bits: a multiple of 4."""
    if not bits.isdecimal() or int(bits) % 4 or not int(bits):
        raise ValueError(f"bits={bits} must be a multiple of 4, such as 16, 32 or 64")
    c.quantizer.num_codebooks = int(bits) // 4


def set_backbone(c: ConfigDict, backbone: str, weights: str, *, image_size: int) -> None:
    """A named backbone or published weights, and how they are fine-tuned (our choice, after DeiT's and BEiT's recipes)."""
    c.model.name, c.model.weights = backbone, weights
    c.model.pooling = "cls"
    c.data.image_size = image_size
    if weights:
        c.quantizer.init = "kmeans"
        c.optim.learning_rate = 5e-4
        c.optim.backbone_rate = 0.1
        c.optim.layer_decay = 0.75


def get_config() -> ConfigDict:
    """The defaults: a small ViT from scratch; `data.source` has to be set."""
    c = ConfigDict()

    c.data = data = ConfigDict()
    data.source = ""  # digits | tfds:<name> | folder:<path>
    data.protocol = "folder"  # which images are queries, database, training images: see docs/protocols.md
    data.split_seed = -1  # of the draw of the protocol; -1 is its own, which gives the published split
    data.query = 0.1  # share of the images held out as queries (protocol folder); 0 where there are no labels
    data.validation = 0.1  # share of the training images held out for validation
    data.image_size = 32  # pixels, the side to which images are decoded, once
    data.resize = "crop"  # crop (cut a square out of the middle) | squash (scale both sides); by the weights unless the command line says
    data.interpolation = "bicubic"  # bicubic | bilinear; by the weights unless the command line says otherwise
    data.crop_share = 1.0  # of the shorter side that "crop" keeps; by the weights unless the command line says
    data.batch_size = 256  # images per step over all devices (two views each)
    data.views = 0  # views of an image in all; 0 draws new ones for ever. A frozen backbone then sees each view once
    data.resident = 1024  # MiB; training images that take no more lie on every device, and are only indexed there
    data.threads = 2  # that read batches ahead
    data.tfds_dir = ""  # where prepared TFDS datasets lie; "" is TFDS's own choice (~/tensorflow_datasets)
    data.cache_dir = ""  # where decoded images are kept; "" is $XDG_CACHE_HOME/tcq or ~/.cache/tcq
    data.augment = augment = ConfigDict()  # all strengths: 0 is off (see tcq/augment.py)
    augment.crop = 0.8  # largest share of the area cut away
    augment.stretch = 0.2877  # log of the largest change of aspect ratio (4/3)
    augment.rotate = 0.0  # degrees
    augment.shift = 0.0  # share of the side
    augment.flip = 0.5  # probability
    augment.brightness = 0.4  # factor 1 +- this
    augment.contrast = 0.4  # factor 1 +- this
    augment.saturation = 0.4  # factor 1 +- this
    augment.hue = 0.1  # turns of the circle, up to 0.5
    augment.jitter = 0.8  # probability of the four changes above
    augment.grayscale = 0.2  # probability
    augment.blur = 0.5  # probability

    c.model = model = ConfigDict()
    model.name = ""  # vit_<ti|s|b|l><4|8|14|16|32>, resnet<18|34|50|101>, or "": a ViT of the numbers below
    model.weights = ""  # published weights or a workdir (docs/weights.md); they decide the keys marked *
    model.width = 192  # *
    model.depth = 6  # * blocks
    model.heads = 3  # *
    model.patch = 8  # * pixels
    model.pooling = (
        "mean"  # cls | mean | flat | attention, of a ViT; weights choose cls unless the command line says otherwise
    )
    model.positions = "learned"  # * learned | sincos2d
    model.mlp_ratio = 4.0  # * hidden width of the MLP over width
    model.class_token = False  # * a learned token also with another pooling than cls
    model.registers = 0  # * further learned tokens
    model.layer_scale = False  # * branches times a learned vector
    model.gelu = "tanh"  # * tanh (as JAX models) | erf (as PyTorch models)
    model.norm_eps = 1e-6  # * added to the variance
    model.stem = "imagenet"  # * of a ResNet: imagenet (7 x 7, stride 2, pooling) | cifar (3 x 3)
    model.mean = (0.5, 0.5, 0.5)  # taken from pixels in [0, 1]; by the weights unless the command line says otherwise
    model.std = (0.5, 0.5, 0.5)  # and then divided by
    model.dropout = 0.0  # rate
    model.drop_path = 0.0  # rate of stochastic depth in the last block
    model.dtype = "float32"  # float32 | bfloat16, of the computation; parameters and statistics are float32
    model.attention = "xla"  # xla | cudnn (NVIDIA GPUs, bfloat16)
    model.remat = False  # blocks are computed again in the backward pass: less memory, more to compute
    model.scan = False  # blocks of a ViT are one loop: compiles faster, copies the parameters once a step

    c.quantizer = quantizer = ConfigDict()
    quantizer.num_codebooks = 8  # M
    quantizer.num_codewords = 16  # K, a power of two up to 65,536
    quantizer.codeword_dim = 16  # d; the feature has D = M * d numbers
    quantizer.bits = 0  # per image; 0 takes M * log2(K), anything else must equal it
    quantizer.scale = 5.0  # inverse temperature of soft assignment
    quantizer.metric = "l2"  # l2 (SPQ) | ip (MeCoQ)
    quantizer.init = "data"  # of the codewords: kmeans | data (features of images) | random
    quantizer.init_images = 1024  # training images that the first two look at, drawn by train.seed

    c.loss = loss = ConfigDict()
    loss.pairing = "cross"  # cross | quantized | float
    loss.temperature = 0.5
    loss.clip = FieldReference(0, field_type=object)  # negatives removed per anchor: a count, or a fraction as a float
    loss.clip_from = 0.0  # share of the run before which nothing is clipped
    loss.clip_full = 0.0  # share of the run from which all of `clip` is; in between it grows
    loss.clip_ramp = "linear"  # linear | cosine
    loss.debias = 0.0  # rho, the assumed share of false negatives of the debiased loss (Chuang et al. 2020); 0 is off
    loss.queue = 0  # soft codes of earlier batches, whose reconstructions are further negatives (MeCoQ)
    loss.queue_from = 0.0  # share of the run before which they are not used
    loss.block_size = 0  # anchors at a time, which bounds the memory; 0 is as many as make 4 M similarities
    loss.gather = "all"  # all | ring: whether a device holds all columns or passes its own round
    loss.entropy_weight = 0.0  # of the mean entropy of the soft codes
    loss.diversity_weight = 0.0  # of the mean cosine between codewords of a codebook

    c.optim = optim = ConfigDict()
    optim.name = "adamw"  # adamw | lars | sgd
    optim.learning_rate = 1e-3  # at the end of the warm-up
    optim.warmup_steps = 100  # linear from 0; then cosine to 0
    optim.backbone_rate = 1.0  # of the backbone, times the learning rate
    optim.head_rate = 1.0  # of the projection
    optim.codebooks_rate = 1.0
    optim.layer_decay = 1.0  # rate of a block over that of the next one; the last has optim.backbone_rate
    optim.frozen_blocks = 0  # so many first blocks, with all before them, are not trained; -1 is the whole backbone
    optim.weight_decay = 1e-4  # on matrices only
    optim.momentum = 0.9  # of lars and sgd
    optim.clip_norm = 1.0  # largest global norm of the gradient; 0 is off

    c.train = train = ConfigDict()
    train.total_steps = 0  # one of these two is set, the other 0
    train.total_epochs = 0.0
    train.microbatches = (
        1  # pieces of a batch that the backbone sees one by one: less memory, the same loss, more to compute
    )
    train.seed = 0  # of initial weights, data order and views
    train.log_every_steps = 50
    train.compare_every_steps = 500  # the copies of the state on all devices, which must be the same bits
    train.max_skipped = (
        10  # steps in a row with a loss or gradient that is not finite; then the run goes back, and then stops
    )

    c.eval = evaluation = ConfigDict()
    evaluation.every_steps = 0  # validation while training; 0 is only at the end
    evaluation.k = -1  # cut-off of mAP@k; -1 is the protocol's own, 0 the whole database
    evaluation.score = "ip"  # similarity of the ranking: ip | l2 | cosine (what the loss compares; FAISS has no such)
    evaluation.normalize = "auto"  # queries before ranking: none | whole | subvectors | auto (as the loss sees them)
    evaluation.squared = True  # "l2" adds squared distances of subvectors; False adds distances, as SPQ's code does
    evaluation.ties = "expected"  # equal scores: expected | index | best | worst (see tcq/metrics.py)
    evaluation.denominator = "hits"  # of average precision: hits | min | all
    evaluation.empty = "zero"  # queries with nothing relevant: zero (they count) | skip
    evaluation.exclude_query = True  # a query that is in the database is left out of its own answers
    evaluation.max_scores = 16_777_216  # float32 scores held in memory at once
    evaluation.batch_size = 64  # images per encoding step and device
    evaluation.max_database = 10_000  # database images used for validation while training

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # and at the end
    checkpoint.keep = 1  # newest checkpoints kept, beside the best

    return c
