from geon.data.codec import ByteCodec


def open_codec(name):
    return ByteCodec()
