"""The quick check, judged suites and exams."""
