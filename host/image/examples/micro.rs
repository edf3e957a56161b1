//! Builds the micro template: `cargo run -p image --example micro -- DIRECTORY CACHE`.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [directory, cache] = arguments.as_slice() else {
        eprintln!("usage: micro DIRECTORY CACHE");
        return ExitCode::from(2);
    };
    // A closed standard output is no reason to stop.
    let say = |line: String| drop(writeln!(std::io::stdout(), "{line}"));
    let mut show = |p: image::micro::Progress| {
        say(format!(
            "{:?}: {} ({} of {} bytes)",
            p.step, p.detail, p.bytes_done, p.bytes_total
        ));
    };
    match image::micro::build(directory.as_ref(), &image::micro::Sources::found(cache), &mut show) {
        Ok(files) => say(format!("{files:#?}")),
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
