//! `pages`: what finding out how a page of a checkpoint travels costs, beside a memcpy of the page and beside other keyed
//! digests.
//!
//! Invariants: each row's memcpy is measured in turns with its work, on the same pages; what counts is this thread's
//! processor time, and of the rounds the median, because a shared machine does other things, too. `hot` pages are in the
//! nearest cache, where a capture leaves what it has just copied; `cold` ones come one after the other from a set larger than
//! the nearer caches.
//!
//! Does not measure a checkpoint, see `checkpoint`.

use std::hint::black_box;

use clap::Args;
use colo_compare::DigestKey;
use colo_vmm::checkpoint::codec::compress::{Lz4, decompress};
use colo_vmm::checkpoint::codec::{Page, PageKey, delta, zero};
use serde::Serialize;
use serde_json::json;

use crate::datapath_cpu::thread_cpu_ns;
use crate::figures::{Range, table};
use crate::place::{BenchError, Outcome};

const PAGE_BYTES: usize = size_of::<Page>();
const MIB: usize = 1 << 20;
/// Few enough for the nearest cache, with as many bases.
const HOT_PAGES: usize = 2;
/// Pages of one round.
const ROUND_PAGES: usize = 65_536;
/// Bytes that a changed page differs in, in runs of eight far apart.
const CHANGED_BYTES: [usize; 2] = [8, 512];

/// Options of `pages`.
#[derive(Debug, Args)]
pub(crate) struct PagesArgs {
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Memory of the cold pages; more than the processor's caches
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    cold_mib: u32,
}

/// One kind of work on hot or cold pages.
#[derive(Debug, Serialize)]
struct Row {
    work: &'static str,
    /// What the pages hold.
    pages: &'static str,
    memory: &'static str,
    ns_per_page: Range,
    memcpy_ns_per_page: Range,
    /// Of both medians.
    ratio: f64,
    gb_per_s: f64,
    /// What a page becomes; absent where it does not shrink or is not meant to.
    result_bytes: Option<usize>,
}

/// What the pages of a row hold.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Contents {
    Noise,
    Zeros,
    Text,
    /// As the base but for so many bytes.
    Changed(usize),
}

impl Contents {
    fn name(self) -> &'static str {
        match self {
            Self::Noise => "noise",
            Self::Zeros => "zeros",
            Self::Text => "text",
            Self::Changed(8) => "8 changed",
            Self::Changed(_) => "512 changed",
        }
    }

    /// A page and its base.
    fn fill(self, seed: usize, base: &mut Page, page: &mut Page) {
        noise(seed, base);
        match self {
            Self::Noise => noise(!seed, page),
            Self::Zeros => page.fill(0),
            Self::Text => {
                let words = [
                    &b"page "[..],
                    b"of ",
                    b"plain ",
                    b"words, ",
                    b"number\n",
                    b"0x",
                ];
                let mut state = seed;
                let mut rest = &mut page[..];
                while !rest.is_empty() {
                    state = next(state);
                    let word = words[state % words.len()];
                    let len = word.len().min(rest.len());
                    let (room, more) = rest.split_at_mut(len);
                    room.copy_from_slice(&word[..len]);
                    rest = more;
                }
            }
            Self::Changed(bytes) => {
                *page = *base;
                let runs = bytes / 8;
                for run in 0..runs {
                    let at = run * (PAGE_BYTES / runs);
                    page[at..at + 8].iter_mut().for_each(|byte| *byte ^= 0xff);
                }
            }
        }
    }
}

/// An xorshift step.
fn next(mut state: usize) -> usize {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
}

fn noise(seed: usize, page: &mut Page) {
    let mut state = (seed << 1) + 1;
    for word in page.as_chunks_mut::<8>().0 {
        state = next(state);
        *word = state.to_le_bytes();
    }
}

/// Pages and their bases.
struct Set {
    pages: Vec<Page>,
    bases: Vec<Page>,
}

impl Set {
    fn new(contents: Contents, pages: usize) -> Self {
        let mut set = Self {
            pages: vec![[0; PAGE_BYTES]; pages],
            bases: vec![[0; PAGE_BYTES]; pages],
        };
        for (seed, (base, page)) in set.bases.iter_mut().zip(&mut set.pages).enumerate() {
            contents.fill(seed + 1, base, page);
        }
        set
    }

    /// Nanoseconds of processor time that `work` takes for a page.
    fn time(&self, work: &mut dyn FnMut(&Page, &Page)) -> f64 {
        let all = || self.pages.iter().zip(&self.bases);
        let turns = (ROUND_PAGES / self.pages.len()).max(1);
        let start_ns = thread_cpu_ns();
        for _ in 0..turns {
            for (page, base) in all() {
                work(page, base);
            }
        }
        (thread_cpu_ns() - start_ns) as f64 / (turns * self.pages.len()) as f64
    }
}

/// Something done to a page, with its name; it gives what the page becomes.
type Work = (&'static str, Box<dyn FnMut(&Page, &Page) -> Option<usize>>);

fn works(contents: Contents) -> Result<Vec<Work>, BenchError> {
    let zero: Work = (
        "zero test",
        Box::new(|page, _| zero::is_zero(black_box(page)).then_some(0)),
    );
    Ok(match contents {
        Contents::Noise => [digests()?, vec![zero, delta_work(), lz4_work()]]
            .into_iter()
            .flatten()
            .collect(),
        Contents::Zeros => vec![zero],
        Contents::Text => vec![lz4_work(), lz4_back_work()],
        Contents::Changed(_) => vec![delta_work(), delta_back_work(contents)],
    })
}

fn digests() -> Result<Vec<Work>, BenchError> {
    let key = PageKey::new([7; 16]);
    let copy_key = PageKey::new([7; 16]);
    let polyval = DigestKey::new([7; 16]);
    let polyval = polyval.ok_or(BenchError::Failed("the digest key is refused".to_owned()))?;
    let mut scratch = [0; PAGE_BYTES];
    Ok(vec![
        (
            "digest",
            Box::new(move |page, _| {
                black_box(key.of(black_box(page)));
                None
            }),
        ),
        (
            "copy+digest",
            Box::new(move |page, _| {
                let copy = |out: &mut Page| {
                    out.copy_from_slice(black_box(page));
                    Ok::<_, ()>(())
                };
                black_box(copy_key.of_copy(&mut scratch, copy).ok());
                None
            }),
        ),
        (
            "polyval",
            Box::new(move |page, _| {
                black_box(polyval.of(black_box(page)));
                None
            }),
        ),
        (
            "blake3",
            Box::new(|page, _| {
                black_box(blake3::keyed_hash(&[7; 32], black_box(page)));
                None
            }),
        ),
    ])
}

fn delta_work() -> Work {
    let mut out = [0; PAGE_BYTES * 3 / 4];
    let work = move |page: &Page, base: &Page| delta::encode(base, page, black_box(&mut out));
    ("delta", Box::new(work))
}

fn delta_back_work(contents: Contents) -> Work {
    let mut one = Set::new(contents, 1);
    let mut delta = vec![0; PAGE_BYTES];
    let len = delta::encode(&one.bases[0], &one.pages[0], &mut delta).unwrap_or(0);
    delta.truncate(len);
    let work = move |_: &Page, base: &Page| {
        black_box(delta::decode(base, black_box(&delta), &mut one.pages[0]).is_ok());
        None
    };
    ("delta back", Box::new(work))
}

fn lz4_work() -> Work {
    let mut lz4 = Lz4::new();
    let work = move |page: &Page, _: &Page| {
        let bytes = lz4.compress(black_box(page), PAGE_BYTES * 3 / 4);
        bytes.map(<[u8]>::len)
    };
    ("lz4", Box::new(work))
}

fn lz4_back_work() -> Work {
    let mut one = Set::new(Contents::Text, 1);
    let mut lz4 = Lz4::new();
    let bytes = lz4
        .compress(&one.pages[0], PAGE_BYTES)
        .unwrap_or_default()
        .to_vec();
    let work = move |_: &Page, _: &Page| {
        black_box(decompress(black_box(&bytes), &mut one.pages[0]).is_ok());
        None
    };
    ("lz4 back", Box::new(work))
}

/// Runs the benchmark.
pub(crate) fn run(args: &PagesArgs) -> Result<Outcome, BenchError> {
    let [few, many] = CHANGED_BYTES.map(Contents::Changed);
    let cold_pages = args.cold_mib as usize * MIB / PAGE_BYTES;
    let mut rows = Vec::new();
    for contents in [Contents::Noise, Contents::Zeros, few, many, Contents::Text] {
        for (memory, pages) in [("hot", HOT_PAGES), ("cold", cold_pages)] {
            eprintln!("{} {memory}", contents.name());
            let set = Set::new(contents, pages);
            for work in works(contents)? {
                rows.push(measure(&set, contents, memory, work, args.rounds));
            }
        }
    }
    Ok(Outcome {
        text: text(&rows),
        json: json!({ "benchmark": "pages", "cold_mib": args.cold_mib, "rows": rows }),
        clean: true,
    })
}

fn measure(
    set: &Set,
    contents: Contents,
    memory: &'static str,
    (work, mut run): Work,
    rounds: u32,
) -> Row {
    let mut to = [0; PAGE_BYTES];
    let result_bytes = run(&set.pages[0], &set.bases[0]);
    let (mut ns, mut memcpy_ns) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        memcpy_ns.push(set.time(&mut |page, _| {
            to.copy_from_slice(black_box(page));
            black_box(&mut to);
        }));
        ns.push(set.time(&mut |page, base| {
            black_box(run(page, base));
        }));
    }
    let (ns, memcpy_ns) = (Range::of(ns), Range::of(memcpy_ns));
    Row {
        work,
        pages: contents.name(),
        memory,
        ns_per_page: ns,
        memcpy_ns_per_page: memcpy_ns,
        ratio: ns.median / memcpy_ns.median,
        gb_per_s: PAGE_BYTES as f64 / ns.median,
        result_bytes,
    }
}

fn text(rows: &[Row]) -> String {
    let heads = [
        "work",
        "pages",
        "memory",
        "ns/page",
        "GB/s",
        "memcpy ns",
        "ratio",
        "bytes",
    ];
    let mut lines = vec![heads.map(str::to_owned).to_vec()];
    for row in rows {
        lines.push(vec![
            row.work.to_owned(),
            row.pages.to_owned(),
            row.memory.to_owned(),
            format!("{:.0}", row.ns_per_page.median),
            format!("{:.1}", row.gb_per_s),
            format!("{:.0}", row.memcpy_ns_per_page.median),
            format!("{:.1}", row.ratio),
            row.result_bytes
                .map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
        ]);
    }
    table(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_what_their_rows_say() {
        let page = |contents| Set::new(contents, 1);
        let shrunk = |contents| {
            let set = page(contents);
            works(contents)
                .unwrap()
                .into_iter()
                .map(|(name, mut work)| (name, work(&set.pages[0], &set.bases[0])))
                .collect::<Vec<_>>()
        };
        assert!(
            shrunk(Contents::Noise)
                .iter()
                .all(|(_, bytes)| bytes.is_none())
        );
        assert_eq!(shrunk(Contents::Zeros), [("zero test", Some(0))]);
        // A run costs two or three bytes besides its own.
        assert_eq!(shrunk(Contents::Changed(8))[0], ("delta", Some(10)));
        let bytes = shrunk(Contents::Changed(512))[0].1.unwrap();
        assert!((640..=704).contains(&bytes), "{bytes}");
        let bytes = shrunk(Contents::Text)[0].1.unwrap();
        assert!((100..3000).contains(&bytes), "{bytes}");
    }
}
