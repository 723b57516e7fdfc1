//! Zstandard of one page: ruzstd's entropy coding of what our own finder finds, which knows that there is no more than a page.

use super::deflate::finder::{Finder, Found};
use super::{Codec, PAGE};
use ruzstd::encoding::{CompressionLevel, FrameCompressor, Matcher, Sequence};

/// Finds copies in the page that is being written.
#[derive(Default)]
struct PageMatcher {
    finder: Finder,
    found: Found,
    /// The page, in the library's buffer.
    space: Vec<u8>,
}

impl Matcher for PageMatcher {
    fn get_next_space(&mut self) -> Vec<u8> {
        let mut space = std::mem::take(&mut self.space);
        // A byte more than there is shows the library that there is no more.
        space.resize(PAGE + 1, 0);
        space
    }

    fn get_last_space(&mut self) -> &[u8] {
        &self.space
    }

    fn commit_space(&mut self, space: Vec<u8>) {
        self.space = space;
    }

    fn skip_matching(&mut self) {}

    fn start_matching(&mut self, mut handle: impl for<'a> FnMut(Sequence<'a>)) {
        let Some(page) = self.space.first_chunk::<PAGE>() else {
            handle(Sequence::Literals { literals: &self.space });
            return;
        };
        self.finder.find_small(page, &mut self.found);
        let mut rest = &page[..];
        for copy in &self.found.copies {
            let (literals, behind) = rest.split_at(copy.literals.into());
            handle(Sequence::Triple {
                literals,
                offset: copy.distance.into(),
                match_len: copy.length.into(),
            });
            rest = &behind[copy.length.into()..];
        }
        handle(Sequence::Literals { literals: rest });
    }

    fn reset(&mut self, _: CompressionLevel) {}

    fn window_size(&self) -> u64 {
        PAGE as u64
    }
}

/// The state, used again from page to page.
pub struct Zstd(FrameCompressor<std::io::Cursor<[u8; PAGE]>, Vec<u8>, PageMatcher>);

impl Default for Zstd {
    fn default() -> Self {
        let mut compressor = FrameCompressor::new_with_matcher(PageMatcher::default(), CompressionLevel::Fastest);
        compressor.set_drain(Vec::new());
        Self(compressor)
    }
}

impl Codec for Zstd {
    fn compress(&mut self, page: &[u8; PAGE], out: &mut Vec<u8>) -> bool {
        self.0.set_source(std::io::Cursor::new(*page));
        // The library writes behind what is there.
        if let Some(drain) = self.0.drain_mut() {
            std::mem::swap(drain, out);
        }
        self.0.compress();
        if let Some(drain) = self.0.drain_mut() {
            std::mem::swap(drain, out);
        }
        true
    }
}
