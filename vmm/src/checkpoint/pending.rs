//! The record of one shard's pending output (rule 12): its frames, in order of production.
//!
//! Does not look into frames.

use crate::machine::record::{Kind, Reader, RecordError, Writer};

const KIND: Kind = Kind {
    name: "pending output",
    magic: *b"CPND",
    version: 1,
};

/// `count:u32`, then of each frame `len:u32` and its bytes; in the memory of `memory`.
pub(super) fn write_record(frames: &[Vec<u8>], memory: Vec<u8>) -> Vec<u8> {
    let mut writer = Writer::reuse(KIND, memory);
    writer.u32(frames.len() as u32);
    for frame in frames {
        writer.u32(frame.len() as u32);
        writer.bytes(frame);
    }
    writer.finish()
}

/// Reads a record.
pub(super) fn from_bytes(bytes: &[u8]) -> Result<Vec<Vec<u8>>, RecordError> {
    let mut reader = Reader::new(KIND, bytes)?;
    let count = reader.u32()?;
    let mut frames = Vec::new();
    for _ in 0..count {
        let len = reader.u32()? as usize;
        frames.push(reader.take(len)?.to_vec());
    }
    reader.finish()?;
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_in_order_and_a_record_cut_anywhere_is_refused() {
        let frames = vec![vec![1; 60], Vec::new(), vec![2; 1514]];
        let bytes = write_record(&frames, Vec::new());
        assert_eq!(from_bytes(&bytes).unwrap(), frames);
        for len in 0..bytes.len() {
            assert!(from_bytes(&bytes[..len]).is_err(), "{len}");
        }
        let mut more = bytes.clone();
        more.push(0);
        assert!(from_bytes(&more).is_err());
        // More frames than there are, also when the length is right.
        let mut short = bytes;
        short[16] = 4;
        crate::machine::record::seal(&mut short);
        assert!(from_bytes(&short).is_err());
    }
}
