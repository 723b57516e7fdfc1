//! makedumpfile's flattened format: a stream of records that say where in the plain file their bytes belong.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

const HEADER_BYTES: usize = 4096;

/// Makes the plain file, in a temporary one, as holes where nothing was written.
///
/// # Errors
/// What is wrong with the stream.
pub fn plain(mut stream: File) -> Result<File, String> {
    stream.seek(SeekFrom::Start(0)).map_err(|error| error.to_string())?;
    plain_from(&mut BufReader::with_capacity(1 << 20, stream))
}

/// As [`plain`], of what cannot be rewound.
///
/// # Errors
/// What is wrong with the stream.
pub fn plain_from(stream: &mut impl Read) -> Result<File, String> {
    let failed = |what: &'static str| move |error: std::io::Error| format!("flattened: {what}: {error}");
    let file = tempfile::tempfile().map_err(failed("temporary file"))?;
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).map_err(failed("header"))?;
    // Type and version are big endian.
    let (known, rest) = header.split_at(32);
    if known != b"makedumpfile\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01" || rest.iter().any(|byte| *byte != 0) {
        return Err(format!("flattened: header {known:x?}"));
    }
    let mut data = Vec::new();
    loop {
        let mut record = [0; 16];
        stream.read_exact(&mut record).map_err(failed("record"))?;
        let field = |at: usize| i64::from_be_bytes(record[at..at + 8].try_into().expect("8 bytes"));
        let (offset, length) = (field(0), field(8));
        if (offset, length) == (-1, -1) {
            return match stream.read(&mut record).map_err(failed("end"))? {
                0 => Ok(file),
                _ => Err("flattened: something follows the last record".into()),
            };
        }
        if offset < 0 || !(0..=64 << 20).contains(&length) {
            return Err(format!("flattened: a record of {length} bytes at {offset}"));
        }
        data.resize(length as usize, 0);
        stream.read_exact(&mut data).map_err(failed("data"))?;
        file.write_all_at(&data, offset as u64)
            .map_err(failed("temporary file"))?;
    }
}
