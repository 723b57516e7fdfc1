//! How a page of a kdump-compressed dump is made small. One state for each worker, used again from page to page: nothing is
//! allocated for a page.

mod deflate;
pub mod lzo;
mod zstd;

use deflate::{Deflate, Effort};
use ipc::dump::Compressor;
use lzo::Lzo;
use zstd::Zstd;

/// Bytes of a page, and of a block of the format.
pub const PAGE: usize = 4096;

/// What compresses pages.
pub trait Codec {
    /// Appends a page's compressed form. More than a page's worth, or `false`, means that the page is to be stored as it is.
    fn compress(&mut self, page: &[u8; PAGE], out: &mut Vec<u8>) -> bool;
}

/// The codec's bit in a page's descriptor and in the header's status.
pub fn flag(compressor: Compressor) -> u32 {
    match compressor {
        Compressor::Zlib | Compressor::SmallZlib => 1,
        Compressor::Lzo => 2,
        Compressor::Snappy => 4,
        Compressor::Zstd => 0x20,
    }
}

/// A codec's state.
pub fn new(compressor: Compressor) -> Box<dyn Codec> {
    match compressor {
        Compressor::Zlib => Box::new(Deflate::new(Effort::Fast)),
        Compressor::SmallZlib => Box::new(Deflate::new(Effort::Small)),
        Compressor::Lzo => Box::new(Lzo::default()),
        Compressor::Snappy => Box::new(Snappy(snap::raw::Encoder::new())),
        Compressor::Zstd => Box::new(Zstd::default()),
    }
}

impl Codec for Lzo {
    fn compress(&mut self, page: &[u8; PAGE], out: &mut Vec<u8>) -> bool {
        self.compress(page, out);
        true
    }
}

/// The raw format, without frames.
struct Snappy(snap::raw::Encoder);

impl Codec for Snappy {
    fn compress(&mut self, page: &[u8; PAGE], out: &mut Vec<u8>) -> bool {
        let begin = out.len();
        out.resize(begin + snap::raw::max_compress_len(PAGE), 0);
        match self.0.compress(page, &mut out[begin..]) {
            Ok(bytes) => {
                out.truncate(begin + bytes);
                true
            }
            Err(_) => false,
        }
    }
}
