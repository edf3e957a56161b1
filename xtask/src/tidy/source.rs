//! Rules on Rust sources: sizes, unfinished work, `unwrap` outside tests, sleeping tests.
//!
//! A rule is waived where it must be by a comment directly above: `// tidy: long because ...`, `// tidy: sleep
//! because ...`. Words are looked for in tokens, so neither strings nor comments are mistaken for code, and what
//! stands inside a macro is seen too.

use std::ops::RangeInclusive;

use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::{Violation, at};

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 70;

/// Everything that is wrong with one file.
pub(super) fn check(path: &str, text: &str) -> Vec<Violation> {
    let lines: Vec<&str> = text.lines().collect();
    let mut violations = Vec::new();
    if lines.len() > FILE_LINES_MAX {
        let what = format!("{} lines; at most {FILE_LINES_MAX}: split it along a noun", lines.len());
        violations.push(at(path, 0, what));
    }
    violations.extend(unfinished_notes(path, &lines));
    let parsed = text.parse::<TokenStream>().map_err(|error| error.to_string());
    let file = parsed.and_then(|tokens| {
        syn::parse2::<syn::File>(tokens.clone())
            .map(|file| (tokens, file))
            .map_err(|error| error.to_string())
    });
    let (tokens, file) = match file {
        Ok(both) => both,
        Err(error) => {
            violations.push(at(path, 0, format!("cannot be parsed: {error}")));
            return violations;
        }
    };
    let mut shape = Shape::default();
    shape.visit_file(&file);
    for (name, line, length) in shape.long {
        if !waived(&lines, line, "long") {
            let what =
                format!("fn {name} has {length} lines; at most {FUNCTION_LINES_MAX}, or `// tidy: long because ...`");
            violations.push(at(path, line, what));
        }
    }
    let mut words = Words {
        path,
        lines: &lines,
        tests: shape.tests,
        is_test: is_test_file(path),
        violations,
    };
    words.walk(&tokens);
    words.violations
}

/// Comments that promise work instead of doing it.
fn unfinished_notes(path: &str, lines: &[&str]) -> Vec<Violation> {
    const NOTES: [&str; 2] = [concat!("FIX", "ME"), concat!("XX", "X")];
    let is_note = |line: &str| {
        line.split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|word| NOTES.contains(&word))
    };
    let found = lines.iter().enumerate().filter(|(_, line)| is_note(line));
    found
        .map(|(index, _)| {
            at(
                path,
                index + 1,
                "a note of unfinished work: finish it, or open an issue",
            )
        })
        .collect()
}

/// Whether a comment directly above the line (attributes and documentation may stand between) or on it gives a reason.
fn waived(lines: &[&str], line: usize, rule: &str) -> bool {
    let mark = format!("// tidy: {rule} because ");
    let gives_reason = |text: &str| {
        text.split_once(&mark)
            .is_some_and(|(_, reason)| reason.trim().len() >= 10)
    };
    let Some(own) = line.checked_sub(1).and_then(|index| lines.get(index)) else {
        return false;
    };
    let above = lines[..line - 1].iter().rev().map(|text| text.trim());
    gives_reason(own)
        || above
            .take_while(|text| text.starts_with("//") || text.starts_with("#["))
            .any(gives_reason)
}

fn is_test_file(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    path.split('/').any(|part| matches!(part, "tests" | "benches")) || name == "tests.rs" || name.ends_with("_tests.rs")
}

/// Lengths of functions, and which lines are tests.
#[derive(Default)]
struct Shape {
    /// Name, line of `fn`, lines of the body.
    long: Vec<(String, usize, usize)>,
    tests: Vec<RangeInclusive<usize>>,
}

impl Shape {
    fn function(&mut self, signature: &syn::Signature, block: &syn::Block, attributes: &[syn::Attribute]) {
        let span = block.brace_token.span;
        let (open, close) = (span.open().start().line, span.close().end().line);
        let start = signature.fn_token.span.start().line;
        let length = close.saturating_sub(open + 1);
        if length > FUNCTION_LINES_MAX {
            self.long.push((signature.ident.to_string(), start, length));
        }
        self.test(attributes, start, close);
    }

    fn test(&mut self, attributes: &[syn::Attribute], start: usize, end: usize) {
        if attributes.iter().any(marks_test) {
            self.tests.push(start..=end);
        }
    }
}

/// `#[test]`, `#[tokio::test]`, `#[cfg(test)]`, `#[cfg(all(test, ...))]`; not `#[cfg(not(test))]`.
fn marks_test(attribute: &syn::Attribute) -> bool {
    if attribute
        .path()
        .segments
        .last()
        .is_some_and(|segment| segment.ident == "test")
    {
        return true;
    }
    let syn::Meta::List(list) = &attribute.meta else {
        return false;
    };
    list.path.is_ident("cfg") && names_test(&list.tokens)
}

fn names_test(tokens: &TokenStream) -> bool {
    let mut negated = false;
    for token in tokens.clone() {
        match token {
            TokenTree::Ident(ident) if ident == "test" => return true,
            TokenTree::Ident(ident) => negated = ident == "not",
            TokenTree::Group(group) if !negated && names_test(&group.stream()) => return true,
            _ => {}
        }
    }
    false
}

impl<'ast> Visit<'ast> for Shape {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, &item.block, &item.attrs);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, &item.block, &item.attrs);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig, block, &item.attrs);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if let Some((brace, _)) = &item.content {
            self.test(
                &item.attrs,
                item.mod_token.span.start().line,
                brace.span.close().end().line,
            );
        }
        visit::visit_item_mod(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        self.test(
            &item.attrs,
            item.impl_token.span.start().line,
            item.brace_token.span.close().end().line,
        );
        visit::visit_item_impl(self, item);
    }
}

/// The walk over tokens, macros' insides included.
struct Words<'a> {
    path: &'a str,
    lines: &'a [&'a str],
    tests: Vec<RangeInclusive<usize>>,
    is_test: bool,
    violations: Vec<Violation>,
}

impl Words<'_> {
    fn walk(&mut self, tokens: &TokenStream) {
        let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
        for (index, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Ident(ident) => {
                    let before = index.checked_sub(1).and_then(|index| tokens.get(index));
                    self.word(&ident.to_string(), ident.span(), before, tokens.get(index + 1));
                }
                TokenTree::Group(group) => {
                    let before = index.checked_sub(1).and_then(|index| tokens.get(index));
                    self.ignored(group, before);
                    self.walk(&group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    fn word(&mut self, word: &str, span: Span, before: Option<&TokenTree>, after: Option<&TokenTree>) {
        let line = span.start().line;
        let called = matches!(after, Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Parenthesis);
        let is_macro = is_punct(after, '!');
        let in_test = self.is_test || self.tests.iter().any(|range| range.contains(&line));
        match word {
            "todo" | "unimplemented" | "dbg" if is_macro => {
                self.push(line, format!("`{word}!` is unfinished work"));
            }
            "unwrap" if called && is_punct(before, '.') && !in_test => {
                self.push(
                    line,
                    "`unwrap` outside tests: return the error, or `expect` the invariant's name",
                );
            }
            "sleep" | "sleep_ms" | "sleep_until"
                if called && in_test && is_call(before) && !waived(self.lines, line, "sleep") =>
            {
                let what = "a test waits for events, not for time; or `// tidy: sleep because ...`";
                self.push(line, what);
            }
            _ => {}
        }
    }

    /// `#[ignore]` and `#[ignore = "..."]`.
    fn ignored(&mut self, group: &proc_macro2::Group, before: Option<&TokenTree>) {
        let first = group.stream().into_iter().next();
        let is_ignore = matches!(&first, Some(TokenTree::Ident(ident)) if ident == "ignore");
        if is_ignore && group.delimiter() == Delimiter::Bracket && is_punct(before, '#') {
            self.push(
                group.span_open().start().line,
                "an ignored test proves nothing: mend it or delete it",
            );
        }
    }

    fn push(&mut self, line: usize, what: impl Into<String>) {
        self.violations.push(at(self.path, line, what));
    }
}

fn is_punct(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

/// A call of a function, not its definition nor a method of that name.
fn is_call(before: Option<&TokenTree>) -> bool {
    !is_punct(before, '.') && !matches!(before, Some(TokenTree::Ident(ident)) if ident == "fn")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        check("host/x/src/x.rs", text)
            .iter()
            .map(Violation::to_string)
            .collect()
    }

    fn function(lines: usize, above: &str) -> String {
        format!("{above}pub fn long() {{\n{}}}\n", "    step();\n".repeat(lines))
    }

    #[test]
    fn a_file_may_have_800_lines_and_not_one_more() {
        assert!(found(&"// a line\n".repeat(FILE_LINES_MAX)).is_empty());
        assert_eq!(found(&"// a line\n".repeat(FILE_LINES_MAX + 1)).len(), 1);
    }

    #[test]
    fn a_function_may_have_70_lines_and_more_only_with_a_reason() {
        assert!(found(&function(FUNCTION_LINES_MAX, "")).is_empty());
        let long = found(&function(FUNCTION_LINES_MAX + 1, ""));
        assert!(
            long.len() == 1 && long[0].starts_with("host/x/src/x.rs:1: fn long has 71 lines"),
            "{long:?}"
        );
        let reason = "// tidy: long because the table is the code\n/// Doc.\n#[inline]\n";
        assert!(found(&function(FUNCTION_LINES_MAX + 1, reason)).is_empty());
        assert_eq!(
            found(&function(FUNCTION_LINES_MAX + 1, "// tidy: long because \n")).len(),
            1
        );
        assert_eq!(
            found(&function(
                FUNCTION_LINES_MAX + 1,
                &format!("{reason}\nstruct Between;\n")
            ))
            .len(),
            1
        );
    }

    #[test]
    fn methods_and_trait_bodies_are_counted_too() {
        let body = "        step();\n".repeat(FUNCTION_LINES_MAX + 1);
        assert_eq!(found(&format!("impl A {{\n    fn m() {{\n{body}    }}\n}}\n")).len(), 1);
        assert_eq!(
            found(&format!("trait A {{\n    fn m() {{\n{body}    }}\n}}\n")).len(),
            1
        );
    }

    #[test]
    fn unfinished_work_is_found_even_inside_macros() {
        assert_eq!(found("fn a() { todo!() }").len(), 1);
        assert_eq!(found("fn a() { select! { _ = b => unimplemented!(), } }").len(), 1);
        assert_eq!(found("fn a() { dbg!(1); }").len(), 1);
        assert_eq!(found(concat!("// FIX", "ME: later\n")).len(), 1);
        assert_eq!(found(concat!("// XX", "X\n")).len(), 1);
        assert!(found(concat!("const T: &str = \"name-XX", "XXXX todo!() .unwrap()\";")).is_empty());
    }

    #[test]
    fn an_ignored_test_is_found() {
        assert_eq!(found("#[test]\n#[ignore]\nfn a() {}").len(), 1);
        assert_eq!(found("#[test]\n#[ignore = \"slow\"]\nfn a() {}").len(), 1);
        assert!(found("fn a(ignore: [u8; 1]) { b[ignore]; }").is_empty());
    }

    #[test]
    fn unwrap_is_for_tests() {
        assert_eq!(found("fn a() { b().unwrap(); }").len(), 1);
        assert_eq!(found("fn a() { format!(\"{}\", b().unwrap()); }").len(), 1);
        assert_eq!(found("#[cfg(not(test))]\nmod a { fn a() { b().unwrap(); } }").len(), 1);
        assert!(found("fn a() { b().unwrap_or_default(); }").is_empty());
        assert!(found("#[test]\nfn a() { b().unwrap(); }").is_empty());
        assert!(found("#[tokio::test]\nasync fn a() { b().unwrap(); }").is_empty());
        assert!(found("#[cfg(test)]\nmod tests { fn a() { b().unwrap(); } }").is_empty());
        assert!(check("host/x/tests/a.rs", "fn a() { b().unwrap(); }").is_empty());
    }

    #[test]
    fn a_sleeping_test_needs_a_reason() {
        let test =
            |above: &str| format!("#[tokio::test]\nasync fn a() {{\n{above}    tokio::time::sleep(D).await;\n}}\n");
        assert_eq!(found(&test("")).len(), 1);
        assert!(
            found(&test(
                "    // tidy: sleep because the guest's clock has no event to wait for\n"
            ))
            .is_empty()
        );
        assert_eq!(found("#[test]\nfn a() { std::thread::sleep(D); }").len(), 1);
        assert!(found("fn a() { std::thread::sleep(D); }").is_empty());
        assert_eq!(
            check("proof/e2e/tests/lab.rs", "fn a() { std::thread::sleep(D); }").len(),
            1
        );
        assert!(found("#[test]\nfn a() { clock.sleep(D); }").is_empty());
    }

    #[test]
    fn a_file_that_is_no_rust_is_found() {
        assert_eq!(found("fn a( {").len(), 1);
        assert_eq!(found("fn 1() {}").len(), 1);
    }
}
