//! Builds the Debian template: `cargo run -p image --example debian -- DIRECTORY CACHE [bookworm|trixie]`.

use image::debian::{Progress, Sources, Suite, build};
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let (Some(directory), Some(cache)) = (arguments.first(), arguments.get(1)) else {
        eprintln!("usage: debian DIRECTORY CACHE [bookworm|trixie]");
        return ExitCode::from(2);
    };
    let suite = match arguments.get(2) {
        Some(suite) if suite == "trixie" => Suite::Trixie,
        _ => Suite::Bookworm,
    };
    let sources = Sources {
        suite,
        mirror: None,
        cache: cache.into(),
    };
    let began = Instant::now();
    // A closed standard output is no reason to stop.
    let mut show = |p: Progress| {
        let at = began.elapsed().as_secs();
        drop(writeln!(
            std::io::stdout(),
            "{at} s {:?}: {} ({} of {} bytes)",
            p.step,
            p.detail,
            p.bytes_done,
            p.bytes_total
        ));
    };
    match build(directory.as_ref(), &sources, &mut show) {
        Ok(files) => drop(writeln!(std::io::stdout(), "{files:#?}")),
        Err(error) => {
            eprintln!("{error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
